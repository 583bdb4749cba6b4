"""Who is calling: from the bearer key to the Caller, with at most one indexed read a second for each key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo import crypto
from perpetuo.db import Database
from perpetuo.errors import NotFound, Unauthenticated
from perpetuo.models import ApiKey, Workspace

# A revoked key is refused within a second on every process. The clock starts before the read.
FRESH_SECONDS = 0.8
STALE_SECONDS = 0.95  # one request reads anew while the others go on with what is known
KEPT = 10_000

BEARER = re.compile(r"bearer +([!-~]+) *", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Caller:
    """An API key with its workspace, as the gateway needs them."""

    workspace_id: str
    api_key_id: str
    api_key_name: str
    models: tuple[str, ...] | None  # names or globs that the key may ask for; None for all
    log_bodies: bool
    config_version: int
    is_limited: bool = False  # a budget of the key or the workspace, or a limit per minute
    has_budget: bool = False


class Access:
    """The keys in use, each kept in memory for less than a second."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[float, float, Caller]] = {}  # by hash: fresh until, stale until
        self._limits: dict[str, tuple[float, bool, bool]] = {}  # by API key: known until, of whom

    def authenticate(self, header: str | None) -> Caller:
        """The caller named by an `Authorization` header.

        Raises Unauthenticated (the same for unknown, expired and revoked keys) and Unavailable.
        """
        if not header:
            raise _refused("Send your API key as `Authorization: Bearer pk_…`.")
        match = BEARER.fullmatch(header)
        if match is None or not crypto.is_api_key(match[1]):
            raise _refused()
        key_hash, moment = crypto.hash_api_key(match[1]), monotonic()
        fresh_until, stale_until, caller = self._known.get(key_hash, (0.0, 0.0, None))
        if caller is not None and moment < fresh_until:
            return caller
        if caller is not None and moment < stale_until:
            self._known[key_hash] = (stale_until, stale_until, caller)
        return self._read(key_hash, moment)

    def caller_of(self, workspace_id: str, api_key_id: str) -> Caller:
        """The caller that one API key of a workspace stands for, for a person who runs a call under it.

        Raises NotFound, Unauthenticated (revoked or expired, as `authenticate`) and Unavailable.
        """
        query = _CALLERS.where(ApiKey.workspace_id == workspace_id, ApiKey.id == api_key_id)
        row = self._database.read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            raise NotFound("There is no such API key.")
        if self._expires_in(row) <= 0:
            raise _refused()
        return _caller(row)

    def _read(self, key_hash: str, moment: float) -> Caller:
        row = self._database.read(lambda connection: _select(connection, key_hash))
        expires_in = self._expires_in(row) if row is not None else 0.0
        if row is None or expires_in <= 0:
            self._known.pop(key_hash, None)
            raise _refused()
        caller = _caller(row)
        if len(self._known) >= KEPT:
            self._known.clear()
            self._limits.clear()
        is_of_workspace = row.monthly_budget_nano is not None
        self._limits[row.id] = (moment + STALE_SECONDS, _limited(row), is_of_workspace)
        self._known[key_hash] = (
            moment + min(FRESH_SECONDS, expires_in),
            moment + min(STALE_SECONDS, expires_in),
            caller,
        )
        return caller

    def _expires_in(self, row: Any) -> float:
        """For how many seconds a key is good; nothing for one that was revoked."""
        if row.revoked_at is not None:
            return 0.0
        if row.expires_at is None:
            return STALE_SECONDS
        # SQLite's own clock counts whole seconds.
        now = datetime.now(UTC) if self._database.is_sqlite else row.now
        seconds: float = (row.expires_at - now).total_seconds()
        return seconds

    def limits_of(self, api_key_id: str) -> tuple[bool, bool]:
        """Whether this API key and its workspace may have a budget or limits: as read a second ago at most,
        else both."""
        known_until, is_of_key, is_of_workspace = self._limits.get(api_key_id, (0.0, True, True))
        return (is_of_key, is_of_workspace) if monotonic() < known_until else (True, True)


def _caller(row: Any) -> Caller:
    return Caller(
        is_limited=_limited(row) or row.monthly_budget_nano is not None,
        has_budget=row.budget_nano is not None or row.monthly_budget_nano is not None,
        workspace_id=row.workspace_id,
        api_key_id=row.id,
        api_key_name=row.name,
        models=tuple(row.models) if row.models is not None else None,
        log_bodies=row.log_bodies,
        config_version=row.config_version,
    )


def _limited(row: Any) -> bool:
    return any(limit is not None for limit in (row.budget_nano, row.rpm_limit, row.tpm_limit))


def _refused(message: str = "This API key is unknown, expired or revoked.") -> Unauthenticated:
    return Unauthenticated(message, code="invalid_api_key")


_CALLERS = sa.select(
    ApiKey.id,
    ApiKey.workspace_id,
    ApiKey.name,
    ApiKey.models,
    ApiKey.expires_at,
    ApiKey.revoked_at,
    ApiKey.budget_nano,
    ApiKey.rpm_limit,
    ApiKey.tpm_limit,
    Workspace.monthly_budget_nano,
    Workspace.log_bodies,
    Workspace.config_version,
    sa.func.now(type_=ApiKey.expires_at.type).label("now"),
).join(Workspace, Workspace.id == ApiKey.workspace_id)
_BY_HASH = _CALLERS.where(ApiKey.hash == sa.bindparam("key_hash"))


def _select(connection: Connection, key_hash: str) -> Any:
    return connection.execute(_BY_HASH, {"key_hash": key_hash}).one_or_none()
