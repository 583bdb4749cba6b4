"""Which addresses may be called, and the connections to them: guarded, pooled, without redirects or proxies.

A base URL comes from a workspace's owner, so what counts is the address that is connected to, never how it
was spelt: a name is resolved once, every answer is checked, and the checked address is the one dialled.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import certifi
from urllib3.connection import HTTPConnection, HTTPSConnection

from perpetuo.config import Settings
from perpetuo.errors import UpstreamError

IDLE_SECONDS = 30.0  # servers close idle connections after 5 to 120 s; a stale one costs a second try
IDLE_PER_HOST = 256

# Not public although `is_global` says so: NAT64, 6to4, IPv4-compatible, Teredo, site-local, and two addresses
# inside the big clouds that answer with credentials.
NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "::/96",
        "2001::/32",
        "fec0::/10",
        "192.0.0.192/32",
        "168.63.129.16/32",
    )
]


class DestinationBlocked(UpstreamError):
    """The upstream's address is not one that this installation calls."""

    code = "destination_blocked"


class Guard:
    """Decides which addresses may be called: public ones, and what the operator allows."""

    def __init__(self, settings: Settings) -> None:
        self._hosts = settings.upstream_allow_hosts
        self._networks = settings.upstream_allow_networks

    def is_allowed(self, host: str, address: str) -> bool:
        """Whether `host`, which resolved to `address`, may be called."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        if host.lower().rstrip(".") in self._hosts or any(ip in network for network in self._networks):
            return True
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)

    def resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """The addresses of `host`, as getaddrinfo gives them. Raises DestinationBlocked, OSError."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, address in found:
            if not self.is_allowed(host, str(address[0])):
                raise DestinationBlocked(
                    f"{host} is not a public address. The operator can allow it with PERPETUO_UPSTREAM_ALLOW."
                )
        return found


def base_url_fault(url: str, settings: Settings) -> str | None:
    """Why this cannot be a base URL, or None. Names are resolved at each connection, not here."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "This is not a URL."
    if parts.scheme not in ("http", "https") or not host or port == 0:
        return "A base URL begins with http:// or https:// and a host."
    if parts.username is not None or parts.password is not None:
        return "A base URL must not hold a user name or password."
    if parts.query or parts.fragment or "?" in url or "#" in url:
        return "A base URL has no ? and no #."
    if not url.isascii() or any(character <= " " or character == "\\" for character in url):
        return "A base URL has only visible ASCII characters."
    if parts.path.rstrip("/").endswith(("/chat/completions", "/embeddings", "/models")):
        return "A base URL ends before /chat/completions: that is appended to it."
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    if not Guard(settings).is_allowed(host, host):
        return f"{host} is not a public address. The operator can allow it with PERPETUO_UPSTREAM_ALLOW."
    return None


class _Guarded:
    """Dials only what the guard let through; mixed into both kinds of connection."""

    guard: Guard
    host: str
    port: int
    timeout: Any

    def _new_conn(self) -> socket.socket:
        refused: OSError | None = None
        for family, kind, protocol, _, address in self.guard.resolve(self.host, self.port):
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
        self._guard = Guard(settings)
        self._connect_timeout = settings.connect_timeout
        self._idle: dict[Origin, list[tuple[float, Connection]]] = {}
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def take(self, origin: Origin, *, fresh: bool = False) -> tuple[Connection, bool]:
        """A connection and whether it was used before; `fresh` asks for one that was not."""
        while not fresh:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    break
                since, connection = idle.pop()
            if monotonic() - since < IDLE_SECONDS and connection.is_connected:
                return connection, True
            connection.close()
        return self._new(origin), False

    def give(self, origin: Origin, connection: Connection) -> None:
        """Takes back a connection whose answer was read to its end."""
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            while idle and monotonic() - idle[0][0] >= IDLE_SECONDS:
                idle.pop(0)[1].close()
            if len(idle) < IDLE_PER_HOST:
                idle.append((monotonic(), connection))
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            for idle in self._idle.values():
                for _, connection in idle:
                    connection.close()
            self._idle = {}

    def _new(self, origin: Origin) -> Connection:
        scheme, host, port = origin
        connection: Connection
        if scheme == "https":
            connection = TlsConnection(host, port, timeout=self._connect_timeout, ssl_context=self._context())
        else:
            connection = PlainConnection(host, port, timeout=self._connect_timeout)
        connection.guard = self._guard
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
