"""The clients' side: how long one may take to send its body, and to take what it is sent.

Under gevent only; elsewhere (tests, commands) a client has all the time it wants.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gevent.socket import socket as GeventSocket
from gevent.timeout import Timeout

from perpetuo.errors import GatewayError
from perpetuo.native import is_patched

WRITE_SECONDS = 30.0  # for a client to take the next PIECE: one that reads slower is taken for gone
PIECE = 65536  # bytes
NO_LINGER = struct.pack("ii", 1, 0)


class Client(GeventSocket):
    """A client's socket. Whatever is written to it, an answer, a stream or a word of the server's own, has
    its deadline.

    What fits into the kernel's buffer, which is nearly everything, needs no clock and costs none.
    """

    __slots__ = ()  # so that a socket of gevent's can become one

    def send(self, data: Any, flags: int = 0, timeout: float | None = None) -> int:
        """All of it, as `sendall`: the server sends files and its `100 Continue` this way."""
        self.sendall(data, flags)
        return len(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Raises BrokenPipeError where the client does not read: the server takes that for its leaving."""
        try:
            sent = self._sock.send(data, flags)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            rest = memoryview(data)[sent:]
            for start in range(0, len(rest), PIECE):
                self._send_slowly(rest[start : start + PIECE])

    def _send_slowly(self, piece: memoryview) -> None:
        deadline = Timeout.start_new(WRITE_SECONDS)
        try:
            while piece:
                self._wait(self._write_event)
                with suppress(BlockingIOError):
                    piece = piece[self._sock.send(piece) :]
        except Timeout as exc:
            if exc is not deadline:
                raise
            # Closing resets: otherwise the kernel offers what it holds to a client that reads nothing for
            # minutes more. nginx: reset_timedout_connection.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            raise BrokenPipeError(errno.EPIPE, "the client does not read") from None
        finally:
            deadline.close()


@contextmanager
def within(seconds: float, error: GatewayError) -> Iterator[None]:
    """Raises `error` in here after so many seconds; it lands only where something is waited for."""
    with Timeout(seconds if is_patched() else None, error):
        yield
