"""The connections to upstreams: to checked addresses only, pooled, without redirects or proxies."""

from __future__ import annotations

import socket
import ssl
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from time import monotonic
from urllib.parse import urlsplit

import certifi
from urllib3.util.wait import wait_for_read

from perpetuo.config import Settings
from perpetuo.gateway.destinations import Guard, Resolver

IDLE_SECONDS = 30.0  # servers close idle connections after 5 to 120 s; a stale one costs a second try
IDLE_PER_HOST = 256
IDLE_IN_ALL = 1000


Origin = tuple[str, str, int]  # scheme, host, port


class Connection:
    """One connection to one origin. `sock` is None until `connect`, and again after `close`.

    Plain HTTP/1.1 over the standard library's parser: what urllib3 does beyond that (two writes a request,
    its own answer around the library's) costs a tenth of a call's time here.
    """

    def __init__(self, origin: Origin, resolver: Resolver, tls: ssl.SSLContext | None) -> None:
        self.origin = origin
        self.sock: socket.socket | None = None
        self._resolver = resolver
        self._tls = tls
        self._host = _host_header(*origin)

    def connect(self, seconds: float) -> None:
        """Dials only what the guard let through. Raises OSError and DestinationBlocked."""
        dialled = self._dialled(seconds)
        try:
            if self._tls is not None:
                dialled = self._tls.wrap_socket(dialled, server_hostname=self.origin[1])
        except BaseException:
            dialled.close()
            raise
        self.sock = dialled

    def _dialled(self, seconds: float) -> socket.socket:
        _, host, port = self.origin
        refused: OSError | None = None
        for family, kind, protocol, _, address in self._resolver.resolve(host, port, seconds):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(seconds)
                connection.connect(address)
            except OSError as exc:
                connection.close()
                refused = exc
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        raise refused or OSError("the name has no address")

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> None:
        """A whole request in one write. Raises OSError, and ValueError for what would end a line early."""
        assert self.sock is not None
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        head = "\r\n".join(lines).encode("latin-1")
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
            raise ValueError("a header of the upstream request holds a line break")
        self.sock.sendall(b"%b\r\n\r\n%b" % (head, body or b""))

    @property
    def is_fresh(self) -> bool:
        """Whether an idle connection can be used again: open, and nothing to be read from it."""
        raw = getattr(self.sock, "_sock", None)  # gevent's name for the socket that does not switch
        if raw is None:
            return self.sock is not None and not wait_for_read(self.sock, timeout=0.0)
        try:
            raw.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Pool:
    """Idle connections of one process, by origin. Taken by one call at a time; HTTP/1.1 keeps no state."""

    def __init__(self, settings: Settings) -> None:
        self._resolver = Resolver(Guard(settings))
        self._idle: dict[Origin, deque[Connection]] = {}
        self._since: OrderedDict[Connection, tuple[float, Origin]] = OrderedDict()  # all, the oldest first
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    @property
    def idle(self) -> int:
        return len(self._since)

    def take(self, origin: Origin, *, fresh: bool = False) -> tuple[Connection, bool]:
        """A connection and whether it was used before; `fresh` asks for one that was not."""
        while not fresh:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    break
                connection = idle[-1]
                since, _ = self._since[connection]
                self._forget(connection)
            if monotonic() - since < IDLE_SECONDS and connection.is_fresh:
                return connection, True
            connection.close()
        return self._new(origin), False

    def give(self, origin: Origin, connection: Connection) -> None:
        """Takes back a connection whose answer was read to its end."""
        with self._lock:
            idle = self._idle.setdefault(origin, deque())
            is_kept = len(idle) < IDLE_PER_HOST
            if is_kept:
                idle.append(connection)
                self._since[connection] = monotonic(), origin
        if not is_kept:
            connection.close()
        self.close_expired()

    def close_expired(self) -> None:
        """Closes what was idle for too long, and the oldest of too many. Looks at no others."""
        expired = []
        with self._lock:
            before = monotonic() - IDLE_SECONDS
            while self._since:
                oldest = next(iter(self._since))
                if self._since[oldest][0] > before and len(self._since) <= IDLE_IN_ALL:
                    break
                self._forget(oldest)
                expired.append(oldest)
        for connection in expired:
            connection.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = list(self._since), {}
            self._since.clear()
        for connection in idle:
            connection.close()

    def _forget(self, connection: Connection) -> None:
        """Under the lock; the newest or the oldest of its origin."""
        _, origin = self._since.pop(connection)
        idle = self._idle[origin]
        idle.pop() if idle[-1] is connection else idle.popleft()
        if not idle:
            del self._idle[origin]

    def _new(self, origin: Origin) -> Connection:
        return Connection(origin, self._resolver, self._context() if origin[0] == "https" else None)

    def _context(self) -> ssl.SSLContext:
        """One for all: loading the authorities takes 20 ms. SSL_CERT_FILE names an operator's own."""
        if self._tls is None:
            context = ssl.create_default_context()
            context.load_verify_locations(certifi.where())
            context.set_alpn_protocols(["http/1.1"])
            self._tls = context
        return self._tls


def origin_of(url: str) -> tuple[Origin, str]:
    """The origin of a URL and its path with the query."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = parts.path or "/"
    return (parts.scheme, parts.hostname or "", port), f"{path}?{parts.query}" if parts.query else path


def _host_header(scheme: str, host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host if host.isascii() else host.encode("idna").decode()
    return name if port == (443 if scheme == "https" else 80) else f"{name}:{port}"
