"""The settings: read once from the environment, one line each, all faults reported together.

Local mode also reads `.env` and makes its own secrets in the data folder; production takes nothing for
granted and refuses to start unsafe. Knows no Flask.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from dotenv import dotenv_values
from sqlalchemy.engine import URL, make_url

from perpetuo import addresses, made_secrets
from perpetuo.addresses import Network

ROOT = Path(__file__).parent.parent  # where migrations/ stands
MINIMUM_SECRET = 32  # characters; OWASP ASVS 5.0 asks for 128 bits, this is twice that even in hex
EXAMPLES = ("change", "example", "secret", "password", "default", "please", "your")

EncryptionKeys = tuple[tuple[str, bytes], ...]
T = TypeVar("T")
N = TypeVar("N", int, float)


class SettingsError(Exception):
    """Everything that is wrong with the settings, a sentence each. Never holds a secret."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("The settings cannot be used:\n" + "\n".join(f"  - {fault}" for fault in faults))
        self.faults = faults


@dataclass(frozen=True, slots=True, repr=False)
class Settings:
    """What the operator decided. Durations are seconds, sizes bytes; secrets come newest first."""

    env: str
    data: Path
    database_url: URL
    secret_keys: tuple[str, ...]
    encryption_keys: EncryptionKeys
    host: str
    port: int
    web_concurrency: int
    public_url: str
    signup: str
    upstream_allow_hosts: frozenset[str]
    upstream_allow_networks: tuple[Network, ...]
    max_body_bytes: int
    max_in_flight: int
    connect_timeout: float
    first_byte_timeout: float
    idle_timeout: float
    total_timeout: float
    budget_wait: float
    orphan_grace: float
    drain_timeout: float
    cors_origins: frozenset[str]
    metrics_token: str | None

    @property
    def is_production(self) -> bool:
        return self.env == "production"

    @property
    def is_https(self) -> bool:
        return self.public_url.startswith("https://")

    @property
    def public_host(self) -> str:
        return urlsplit(self.public_url).netloc


class _Reader:
    """Reads one variable after the other and collects what is wrong with each."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.faults: list[str] = []

    def text(self, name: str, default: str) -> str:
        return self.environ.get(name, "").strip() or default

    def parse(self, name: str, default: str, parse: Callable[[str], T], wanted: str) -> T:
        try:
            return parse(self.text(name, default))
        except ValueError:
            self.faults.append(f"{name} must be {wanted}.")
            return parse(default)

    def address(self, read: Callable[[], T], spare: T) -> T:
        """What `perpetuo.addresses` makes of a setting; its refusals are whole sentences."""
        try:
            return read()
        except ValueError as exc:
            self.faults.append(str(exc))
            return spare

    def number(self, name: str, default: int, least: int = 1) -> int:
        return self.parse(
            name, str(default), lambda text: _at_least(int(text), least), f"a whole number from {least}"
        )

    def seconds(self, name: str, default: float, least: float = 0.001) -> float:
        return self.parse(
            name, str(default), lambda text: _at_least(float(text), least), "a number of seconds"
        )

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        def one_of(text: str) -> str:
            if text not in choices:
                raise ValueError(text)
            return text

        return self.parse(name, default, one_of, "one of " + ", ".join(choices))

    def listed(self, name: str) -> list[str]:
        return [part.strip() for part in self.text(name, "").split(",") if part.strip()]


def load(environ: Mapping[str, str] | None = None, dotenv: Path | None = None) -> Settings:
    """The settings from `environ` (default: the process's, with `.env` beneath it in local mode).

    Raises SettingsError with every fault. In local mode missing secrets are made and kept in the data folder.
    """
    if environ is None:
        environ = os.environ
        dotenv = dotenv or Path(".env")
    if dotenv is not None and environ.get("PERPETUO_ENV", "local") == "local":
        environ = {**{k: v or "" for k, v in dotenv_values(dotenv).items()}, **environ}
    read = _Reader(environ)
    env = read.choice("PERPETUO_ENV", "local", ("local", "production"))
    production = env == "production"
    data = Path(read.text("PERPETUO_DATA", "instance")).absolute()
    made = {} if production or read.faults else _local_secrets(data, read)
    port = read.number("PORT", 8000)
    secret_keys = tuple(read.listed("SECRET_KEY")) or made.get("SECRET_KEY", ())
    encryption_keys = _encryption_keys(read) or made.get("ENCRYPTION_KEYS", ())
    metrics_token = read.text("PERPETUO_METRICS_TOKEN", "") or None
    allowed = read.listed("PERPETUO_UPSTREAM_ALLOW")
    none: addresses.Allowed = (frozenset(), ())
    hosts, networks = read.address(
        lambda: addresses.allowed_upstreams(allowed, is_local=not production), none
    )
    database = read.text("DATABASE_URL", f"sqlite:///{data / 'perpetuo.db'}")
    public_url = read.text("PUBLIC_URL", "" if production else f"http://localhost:{port}")
    origins = read.listed("PERPETUO_CORS_ORIGINS")
    settings = Settings(
        env=env,
        data=data,
        database_url=read.address(lambda: addresses.database_url(database), make_url("sqlite://")),
        secret_keys=secret_keys,
        encryption_keys=encryption_keys,
        host=read.text("HOST", "0.0.0.0" if production else "127.0.0.1"),  # noqa: S104 - a server's own default
        port=port,
        web_concurrency=read.number("WEB_CONCURRENCY", 2),
        public_url=read.address(lambda: addresses.public_url(public_url), ""),
        signup=read.choice("PERPETUO_SIGNUP", "first" if production else "open", ("open", "first", "closed")),
        upstream_allow_hosts=hosts,
        upstream_allow_networks=networks,
        max_body_bytes=read.number("PERPETUO_MAX_BODY_BYTES", 20 * 1024 * 1024, 1024),
        max_in_flight=read.number("PERPETUO_MAX_IN_FLIGHT", 2000),
        connect_timeout=read.seconds("PERPETUO_CONNECT_TIMEOUT", 5),
        first_byte_timeout=read.seconds("PERPETUO_FIRST_BYTE_TIMEOUT", 120),
        idle_timeout=read.seconds("PERPETUO_IDLE_TIMEOUT", 120),
        total_timeout=read.seconds("PERPETUO_TOTAL_TIMEOUT", 900),
        budget_wait=read.seconds("PERPETUO_BUDGET_WAIT", 5, 0),
        orphan_grace=read.seconds("PERPETUO_ORPHAN_GRACE", 0 if _is_sqlite(read) else 30, 0),
        drain_timeout=read.seconds("PERPETUO_DRAIN_TIMEOUT", 20, 0),
        cors_origins=read.address(lambda: addresses.origins(origins), frozenset()),
        metrics_token=metrics_token,
    )
    if production:
        _refuse_unsafe(settings, read)
    if read.faults:
        raise SettingsError(read.faults)
    return settings


def _at_least(number: N, least: float) -> N:
    if not least <= number < 1e15:  # also false for NaN
        raise ValueError(number)
    return number


def _is_sqlite(read: _Reader) -> bool:
    return not read.text("DATABASE_URL", "").startswith("postgres")


def _encryption_keys(read: _Reader) -> EncryptionKeys:
    keys = []
    for part in read.listed("ENCRYPTION_KEYS"):
        name, _, text = part.partition(":")
        try:
            key = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not name or len(key) != 32:
            read.faults.append(
                "ENCRYPTION_KEYS must be id:base64 of 32 bytes, comma-separated (`flask secrets` makes one)."
            )
            return ()
        keys.append((name, key))
    if len({name for name, _ in keys}) != len(keys):
        read.faults.append("ENCRYPTION_KEYS has an id twice.")
    return tuple(keys)


def _refuse_unsafe(settings: Settings, read: _Reader) -> None:
    if not settings.secret_keys:
        read.faults.append("SECRET_KEY must be set in production (`flask --app wsgi secrets` makes one).")
    for key in settings.secret_keys:
        if len(key) < MINIMUM_SECRET:
            read.faults.append(f"SECRET_KEY must have at least {MINIMUM_SECRET} characters.")
        elif len(set(key)) < 10 or any(word in key.lower() for word in EXAMPLES):
            read.faults.append("SECRET_KEY looks like an example; make a fresh one.")
    if not settings.encryption_keys and not any("ENCRYPTION_KEYS" in fault for fault in read.faults):
        read.faults.append(
            "ENCRYPTION_KEYS must be set in production (`flask --app wsgi secrets` makes one)."
        )
    for _, raw in settings.encryption_keys:
        if len(set(raw)) < 10:
            read.faults.append("ENCRYPTION_KEYS looks like an example; make a fresh one.")
    if settings.metrics_token is not None and len(settings.metrics_token) < MINIMUM_SECRET:
        read.faults.append(f"PERPETUO_METRICS_TOKEN must have at least {MINIMUM_SECRET} characters.")
    texts = [*settings.secret_keys, *(base64.b64encode(key).decode() for _, key in settings.encryption_keys)]
    texts += [settings.metrics_token] if settings.metrics_token else []
    if len(set(texts)) != len(texts):
        read.faults.append("SECRET_KEY, ENCRYPTION_KEYS and PERPETUO_METRICS_TOKEN must all differ.")


def _local_secrets(data: Path, read: _Reader) -> dict:
    """The secrets of local mode, made by whichever process comes first and read by all."""
    if read.text("SECRET_KEY", "") and read.text("ENCRYPTION_KEYS", ""):
        return {}
    path = data / "secrets.env"
    try:
        kept = _Reader(made_secrets.read(path))
    except OSError as exc:
        read.faults.append(f"PERPETUO_DATA: the secrets in {path} cannot be read or made ({exc.strerror}).")
        return {}
    made = {"SECRET_KEY": tuple(kept.listed("SECRET_KEY")), "ENCRYPTION_KEYS": _encryption_keys(kept)}
    if not all(made.values()):
        read.faults.append(f"{path} is damaged: restore it, since it opens the stored provider keys.")
    return made
