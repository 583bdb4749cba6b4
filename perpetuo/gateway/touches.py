"""When keys were last used, and what a provider last complained of: written once a minute for each key.

Sooner only where a provider key begins or ceases to fail; another text of the same trouble waits its minute.
In a transaction of its own behind the ledger's, since nobody waits for it and losing one harms nobody.
"""

from __future__ import annotations

import logging
from datetime import datetime
from time import monotonic
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database, storable
from perpetuo.models import ApiKey, ProviderKey

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
KEPT = 10_000
OURS = "invalid_request_error"
TEXT = 1000  # characters of a complaint


class Touches:
    """What is due for writing. Used by the request threads (`note`) and by the writer (`flush`)."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._written: dict[str, tuple[float, bool]] = {}
        self._due: dict[str, tuple[datetime, str | None, bool]] = {}

    def note(self, api_key_id: str, outcome: dict[str, Any]) -> None:
        """A call ended: its API key was used, and its provider key worked or did not."""
        self._note(api_key_id, outcome["finished_at"], None, False)
        for attempt in outcome.get("attempts") or ():
            if attempt.get("http_status") is None and (attempt["error"] or {}).get("type") == OURS:
                continue  # never sent: the request had a parameter that this provider has no place for
            error = storable(attempt["error"]["message"][:TEXT])[:TEXT] if attempt["error"] else None
            self._note(attempt["provider_key_id"], outcome["finished_at"], error, True)

    def _note(self, key_id: str, moment: datetime, error: str | None, is_provider: bool) -> None:
        at, was_failing = self._written.get(key_id, (-EVERY_SECONDS, False))
        is_failing = error is not None
        if key_id in self._due or is_failing != was_failing or monotonic() - at >= EVERY_SECONDS:
            self._due[key_id] = (moment, error, is_provider)

    def flush(self) -> None:
        """Writes what is due; a database that is away keeps nobody waiting for it."""
        if not self._due:
            return
        due, self._due = self._due, {}
        if len(self._written) > KEPT:
            self._written.clear()
        for key_id, (_, error, _) in due.items():
            self._written[key_id] = (monotonic(), error is not None)
        try:
            self._database.transaction(lambda connection: _write(connection, due))
        except Exception:  # the writer's thread must outlive whatever this meets
            log.warning("the time of last use of %d keys could not be written", len(due), exc_info=True)


def _write(connection: Connection, due: dict[str, tuple[datetime, str | None, bool]]) -> None:
    for key_id in sorted(due):  # in one order, so that two processes never wait for each other
        moment, error, is_provider = due[key_id]
        table = ProviderKey if is_provider else ApiKey
        values: dict[str, Any] = {"last_used_at": moment}
        if is_provider:
            values["last_error"] = error
        connection.execute(sa.update(table).where(table.id == key_id).values(values))
