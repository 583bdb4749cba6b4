"""Which addresses may be called: names looked up, every answer checked, and only checked ones handed out.

A base URL comes from a workspace's owner, so what counts is the address that is connected to, never how it
was spelt.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from perpetuo.config import Settings
from perpetuo.errors import UpstreamError
from perpetuo.native import LOOKUPS, Native

FRESH_SECONDS = 30.0  # after that a name is looked up again
STALE_SECONDS = 300.0  # the old addresses serve so long where looking up again takes long or fails
PATIENCE_SECONDS = 0.5
NAMES_KEPT = 1000
NEW_LOOKUPS = 48  # of the LOOKUPS at a time, for names that were not found before

_API_VERSION = re.compile(r"api-version=[0-9A-Za-z.-]{1,40}")  # Azure's older URLs need it

Address = tuple[Any, ...]  # as getaddrinfo gives it

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

    def check(self, host: str, addresses: list[Address]) -> list[Address]:
        """These addresses of `host`, if every one may be called. Raises DestinationBlocked."""
        for *_, address in addresses:
            if not self.is_allowed(host, str(address[0])):
                raise DestinationBlocked(
                    f"{host} is not a public address. The operator can allow it with PERPETUO_UPSTREAM_ALLOW."
                )
        return addresses


class Resolver:
    """Looks names up, each once at a time, and keeps what was found and checked.

    A lookup without an answer holds its thread until the system gives up, whoever left meanwhile. So names
    that were not found before share some of the threads, and those that were get the rest.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._native = Native()  # never closed: that would wait for the threads
        self._found: dict[str, tuple[float, list[Address]]] = {}  # by host, the oldest first
        self._lookups: dict[str, Future[list[Address]]] = {}  # those in flight
        self._new_slots = threading.Semaphore(NEW_LOOKUPS)
        self._slots = threading.Semaphore(LOOKUPS - NEW_LOOKUPS)
        self._lock = threading.Lock()

    def resolve(self, host: str, port: int, seconds: float) -> list[Address]:
        """The checked addresses of `host`, as getaddrinfo gives them, within `seconds`.

        Raises DestinationBlocked, OSError.
        """
        addresses = self._guard.check(host, _literal(host) or self._addresses(host, seconds))
        return [(*how, (address[0], port, *address[2:])) for *how, address in addresses]

    def _addresses(self, host: str, seconds: float) -> list[Address]:
        """Fresh ones, or old ones while asking again takes long or fails."""
        found_at, found = self._found.get(host, (0.0, []))
        age = monotonic() - found_at
        if found and age < FRESH_SECONDS:
            return found
        lookup = self._lookup(host, seconds)
        if not found or age >= STALE_SECONDS:
            return lookup.result(seconds)
        try:
            return lookup.result(min(seconds, PATIENCE_SECONDS))
        except OSError:  # TimeoutError is one
            return found

    def _lookup(self, host: str, seconds: float) -> Future[list[Address]]:
        with self._lock:
            if host in self._lookups:
                return self._lookups[host]
            lookup: Future[list[Address]] = Future()
            self._lookups[host] = lookup
        # A thread (under gevent a greenlet) of its own, since the call that asks first may be ended.
        threading.Thread(target=self._run, args=(host, lookup, seconds), daemon=True).start()
        return lookup

    def _run(self, host: str, lookup: Future[list[Address]], seconds: float) -> None:
        try:
            addresses = self._ask(host, seconds)
        except BaseException as exc:  # noqa: BLE001 - travels to those who wait
            lookup.set_exception(exc)
        else:
            self._keep(host, addresses)
            lookup.set_result(addresses)
        finally:
            with self._lock:
                del self._lookups[host]

    def _ask(self, host: str, seconds: float) -> list[Address]:
        slots = self._slots if host in self._found else self._new_slots
        if not slots.acquire(timeout=seconds):
            raise socket.gaierror(socket.EAI_AGAIN, "too many names are being looked up")
        try:
            return self._native.look_up(host)
        except UnicodeError as exc:
            raise socket.gaierror(socket.EAI_NONAME, "this cannot be a host name") from exc
        finally:
            slots.release()

    def _keep(self, host: str, addresses: list[Address]) -> None:
        """Only what may be called is kept, and what may no longer be called is forgotten."""
        with self._lock:
            self._found.pop(host, None)
            with suppress(DestinationBlocked):
                self._found[host] = monotonic(), self._guard.check(host, addresses)
            if len(self._found) > NAMES_KEPT:
                del self._found[next(iter(self._found))]


def _literal(host: str) -> list[Address]:
    """An IP address as getaddrinfo would give it; nothing for names, and for what has a scope."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return []
    if isinstance(ip, ipaddress.IPv4Address):
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, 0))]
    if ip.scope_id is not None:  # the system must turn its name into a number
        return []
    return [(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, 0, 0, 0))]


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
    if parts.fragment or "#" in url or ("?" in url and not _API_VERSION.fullmatch(parts.query)):
        return "A base URL has no # and no ?, but for Azure's ?api-version=…"
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
