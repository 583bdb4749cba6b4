"""A TCP proxy on a loopback thread that breaks the way to PostgreSQL where a test wants it broken.

It reads the frontend's messages just far enough to find a COMMIT sent as a simple query, which is how
psycopg2 sends everything. Source: PostgreSQL documentation, "Message Formats". TLS passes through unread.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import threading
import time

from tests.fake_upstream import LoopbackServer, bind_loopback

COMMIT = re.compile(rb"(?:^|;)\s*(?:COMMIT|END)(?:\s+(?:WORK|TRANSACTION))?\s*;?\s*\0$", re.IGNORECASE)
READY_FOR_QUERY = re.compile(rb"Z\0\0\0\x05[ITE]$")
LONGEST_COMMIT_BYTES = 4096  # a longer query is passed on as it comes, never collected
SSL_REQUEST, GSSENC_REQUEST = 80877103, 80877104
RECEIVE_BYTES = 65536
COMMIT_ANSWER_TIMEOUT_SECONDS = 30


class FaultProxy(LoopbackServer):
    """Stands in front of `target` (host, port); clients connect to `proxy.address`.

    `silent` keeps connections and forwards nothing in either direction until it is False again. `refuse`
    refuses new connections; those that exist stay (see `cut`). `latency` is in seconds, for each way.
    """

    def __init__(self, target: tuple[str, int], *, latency: float = 0.0) -> None:
        self.target = target
        self.latency = latency
        self.silent = False
        self.commits_seen = 0
        self.commits_cut = 0
        self._refuse = False
        self._cuts_left = 0
        self._cut_before = False
        self._changed = threading.Condition()
        super().__init__()

    @property
    def refuse(self) -> bool:
        return self._refuse

    @refuse.setter
    def refuse(self, refuse: bool) -> None:
        if refuse and not self._refuse:
            self._stop_listening()
            self._listener.close()
            # Bound without listening: the kernel refuses, and nobody else can take the port meanwhile.
            self._listener = bind_loopback(self.port)
        elif self._refuse and not refuse:
            self._start_listening()
        self._refuse = refuse

    def cut(self) -> None:
        """Closes every connection now."""
        self.close_connections()

    def cut_at_commit(self, before: bool, times: int = 1) -> None:
        """Cuts the connections on which the next COMMITs pass.

        With `before` the server never gets the COMMIT and rolls back. Otherwise it commits, and the client
        does not get to know. `commits_cut` counts what was done; `times=0` takes it back.
        """
        with self._changed:
            self._cut_before, self._cuts_left = before, times

    def wait_for_cuts(self, count: int = 1, timeout_seconds: float = 10.0) -> None:
        """Waits until that many COMMITs were cut."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.commits_cut >= count, timeout_seconds):
                raise AssertionError(f"{self.commits_cut} commits cut, not {count}, in {timeout_seconds} s")

    def serve(self, connection: socket.socket, number: int) -> None:
        with socket.create_connection(self.target, timeout=10) as server:
            server.settimeout(None)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open.add(server)  # so that a cut reaches the server even while the proxy is silent
            try:
                self._pass_bytes(connection, server)
            finally:
                with self._lock:
                    self._open.discard(server)

    def _pass_bytes(self, client: socket.socket, server: socket.socket) -> None:
        frontend = _FrontendReader()
        poller = select.poll()
        poller.register(client, select.POLLIN)
        poller.register(server, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            self._wait_while_silent()
            if client.fileno() in ready:
                received = client.recv(RECEIVE_BYTES)
                if not received:
                    return
                for part, is_commit in frontend.read(received):
                    if is_commit and self._takes_commit():
                        self._cut_commit(part, server)
                        return
                    self._forward(part, server)
            if server.fileno() in ready:
                received = server.recv(RECEIVE_BYTES)
                if not received:
                    return
                frontend.note_answer(received)
                self._forward(received, client)

    def _takes_commit(self) -> bool:
        with self._changed:
            self.commits_seen += 1
            if self._cuts_left <= 0:
                return False
            self._cuts_left -= 1
            return True

    def _cut_commit(self, commit: bytes, server: socket.socket) -> None:
        if not self._cut_before:
            self._forward(commit, server)
            server.settimeout(COMMIT_ANSWER_TIMEOUT_SECONDS)
            answer = b""
            while not READY_FOR_QUERY.search(answer):
                received = server.recv(RECEIVE_BYTES)
                if not received:
                    break
                answer += received
        with self._changed:
            self.commits_cut += 1
            self._changed.notify_all()

    def _forward(self, part: bytes, receiver: socket.socket) -> None:
        if self.latency:
            self._sleep(self.latency)
        receiver.sendall(part)

    def _wait_while_silent(self) -> None:
        while self.silent and not self.is_closing:
            time.sleep(0.005)

    def _sleep(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        while not self.is_closing and (remaining := ends_at - time.monotonic()) > 0:
            time.sleep(min(remaining, 0.05))


class _FrontendReader:
    """Splits what a client sends so that a COMMIT stands alone; everything else keeps its order and bytes."""

    def __init__(self) -> None:
        self._buffer = b""
        self._remaining_bytes = 0  # of a message that is passed on without being collected
        self._is_starting = True  # the first messages have no type byte
        self._asked_to_encrypt = False
        self._is_opaque = False

    def note_answer(self, received: bytes) -> None:
        """The server's byte after a request to encrypt: anything but N, and we read no more."""
        if self._asked_to_encrypt:
            self._asked_to_encrypt = False
            self._is_opaque = received[:1] != b"N"

    def read(self, received: bytes) -> list[tuple[bytes, bool]]:
        """Parts to forward in order, each with whether it is a COMMIT."""
        if self._is_opaque:
            return [(received, False)]
        self._buffer += received
        parts: list[tuple[bytes, bool]] = []
        plain = b""
        while (part := self._next_part()) is not None:
            if COMMIT.search(part[5:]) and part[:1] == b"Q":
                parts += [(plain, False)] if plain else []
                parts.append((part, True))
                plain = b""
            else:
                plain += part
        return parts + ([(plain, False)] if plain else [])

    def _next_part(self) -> bytes | None:
        """A whole message, or of a long one what there is; None where more bytes are needed."""
        if self._remaining_bytes:
            return self._take(self._remaining_bytes) if self._buffer else None
        header_bytes = 4 if self._is_starting else 5
        if len(self._buffer) < header_bytes:
            return None
        size = struct.unpack("!I", self._buffer[header_bytes - 4 : header_bytes])[0] + header_bytes - 4
        if size > LONGEST_COMMIT_BYTES and not self._is_starting:
            self._remaining_bytes = size
            return self._take(size)
        if len(self._buffer) < size:
            return None
        message, self._buffer = self._buffer[:size], self._buffer[size:]
        if self._is_starting:
            code = struct.unpack("!I", message[4:8])[0]
            self._asked_to_encrypt = code in (SSL_REQUEST, GSSENC_REQUEST)
            self._is_starting = self._asked_to_encrypt
        return message

    def _take(self, size: int) -> bytes:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        self._remaining_bytes -= len(taken)
        return taken
