"""The connections to upstreams: to checked addresses only, pooled, without redirects or proxies."""

from __future__ import annotations

import socket
import ssl
import threading
from collections import OrderedDict, deque
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import certifi
from urllib3.connection import HTTPConnection, HTTPSConnection

from perpetuo.config import Settings
from perpetuo.gateway.destinations import Guard, Resolver

IDLE_SECONDS = 30.0  # servers close idle connections after 5 to 120 s; a stale one costs a second try
IDLE_PER_HOST = 256
IDLE_IN_ALL = 1000


class _Guarded:
    """Dials only what the guard let through; mixed into both kinds of connection."""

    resolver: Resolver
    host: str
    port: int
    timeout: Any

    def _new_conn(self) -> socket.socket:
        refused: OSError | None = None
        for family, kind, protocol, _, address in self.resolver.resolve(self.host, self.port, self.timeout):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(self.timeout)
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


class PlainConnection(_Guarded, HTTPConnection):
    pass


class TlsConnection(_Guarded, HTTPSConnection):
    pass


Connection = PlainConnection | TlsConnection
Origin = tuple[str, str, int]  # scheme, host, port


class Pool:
    """Idle connections of one process, by origin. Taken by one call at a time; HTTP/1.1 keeps no state."""

    def __init__(self, settings: Settings) -> None:
        self._resolver = Resolver(Guard(settings))
        self._connect_timeout = settings.connect_timeout
        self._idle: dict[Origin, deque[Connection]] = {}
        self._since: OrderedDict[Connection, tuple[float, Origin]] = OrderedDict()  # all, the oldest first
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

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
            if monotonic() - since < IDLE_SECONDS and connection.is_connected:
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
        scheme, host, port = origin
        connection: Connection
        if scheme == "https":
            connection = TlsConnection(host, port, timeout=self._connect_timeout, ssl_context=self._context())
        else:
            connection = PlainConnection(host, port, timeout=self._connect_timeout)
        connection.resolver = self._resolver
        return connection

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
