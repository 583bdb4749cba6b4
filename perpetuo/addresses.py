"""Addresses as the settings name them: the database's, our own, those of upstreams and of browsers' pages.

Each public function takes a setting's text and raises ValueError with the sentence that the operator reads.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Allowed = tuple[frozenset[str], tuple[Network, ...]]

# Local mode: loopback and private ranges, since that is where Ollama and vLLM are.
HOME = ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")


def database_url(text: str) -> URL:
    """`postgres://` and `postgresql://` both mean psycopg2 (for SQLAlchemy 2.1 alone, psycopg 3)."""
    try:
        url = make_url(text)
    except ArgumentError as exc:
        raise ValueError("DATABASE_URL must be a postgresql:// or sqlite:/// address.") from exc
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg2"):
        return url.set(drivername="postgresql+psycopg2")
    if url.drivername == "sqlite" and url.database and url.database != ":memory:":
        return url.set(database=str(Path(url.database).absolute()))
    raise ValueError("DATABASE_URL must be a postgresql:// address, or sqlite:/// with the path of a file.")


def public_url(text: str) -> str:
    """Where people reach us: scheme, host and port."""
    text = text.rstrip("/")
    if not text:
        raise ValueError("PUBLIC_URL must be set in production, such as https://gateway.example.com.")
    parts = _split(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.username:
        raise ValueError("PUBLIC_URL must be http:// or https:// with a host and no path.")
    return text


def allowed_upstreams(texts: Iterable[str], *, is_local: bool) -> Allowed:
    """Hosts and networks that upstreams may have although they are not public; local mode adds some."""
    hosts: set[str] = set()
    networks: list[Network] = [ipaddress.ip_network(text) for text in HOME] if is_local else []
    for text in texts:
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError as exc:
            if "/" in text or ":" in text:
                raise ValueError(
                    "PERPETUO_UPSTREAM_ALLOW must list host names, addresses or networks (CIDR)."
                ) from exc
            hosts.add(text.lower().rstrip("."))
    return frozenset(hosts), tuple(networks)


def origins(texts: Iterable[str]) -> frozenset[str]:
    """Exact origins: scheme, host and port, no star."""
    found = frozenset(texts)
    for origin in found:
        parts = _split(origin)
        is_bare = origin == f"{parts.scheme}://{parts.netloc}" and "*" not in origin
        if parts.scheme not in ("http", "https") or not is_bare:
            raise ValueError(
                "PERPETUO_CORS_ORIGINS must list exact origins, such as https://app.example.com."
            )
    return found


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:  # a bracket that does not close, which our own sentence tells better
        return urlsplit("")
