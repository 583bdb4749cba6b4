"""Puts right what the dead left open: rows whose process is gone are settled as `interrupted`.

Two looks: the first stamps the row, one at least `grace` seconds later settles it. Never by age: a row is
an orphan because its owner's lock is free. An owner that was only cut off still settles its row itself.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.errors import Unavailable
from perpetuo.gateway import costs
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.rows import Row, Snapshot
from perpetuo.gateway.statements import Values
from perpetuo.models import RequestLog
from perpetuo.pricing import Price

log = logging.getLogger(__name__)

EVERY_SECONDS = 10.0
BATCH = 200

LOGS = RequestLog.__table__
NARROW = [column for column in LOGS.columns if not column.name.endswith("_body")]


class Sweep:
    """`look()` once, or `start()` a thread that looks now and then."""

    def __init__(
        self, ledger: Ledger, grace_seconds: float, beside: Callable[[], None] = lambda: None
    ) -> None:
        self._ledger = ledger
        self._beside = beside  # what else is to be done now and then
        self._grace = timedelta(seconds=grace_seconds)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ledger-sweep", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._beside()
                self._ledger.keep_lock()
                self.look()
            except Unavailable as exc:
                log.warning("the sweep could not look: %s", exc)
            except Exception:
                log.exception("the sweep failed")
            self._ended.wait(EVERY_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - spreads the processes

    def look(self) -> int:
        """Stamps the orphans that are new, settles those stamped long enough; how many it settled.

        Raises Unavailable.
        """
        database = self._ledger.database
        owners = database.read(_owners)
        living = self._ledger.living(set(owners))
        dead = {owner for owner in owners if owner not in living}
        if any(owners[owner][1] for owner in living):
            database.transaction(lambda connection: _stamp(connection, living, None))
        if any(owners[owner][0] for owner in dead):
            database.transaction(lambda connection: _stamp(connection, dead, database.now(connection)))
        settled = 0
        while rows := self._due(dead):
            settled += self._settle(rows)
        return settled

    def _due(self, dead: set[int]) -> list[Values]:
        """The next orphans to settle, with everything that their rows hold but the bodies."""
        if not dead:
            return []

        def select(connection: Connection) -> list[Values]:
            before = self._ledger.database.now(connection) - self._grace
            statement = (
                sa.select(*NARROW)
                .where(LOGS.c.status == "open", LOGS.c.owner.in_(dead), LOGS.c.orphaned_at <= before)
                .order_by(LOGS.c.id)
                .limit(BATCH)
            )
            return [dict(row) for row in connection.execute(statement).mappings()]

        return self._ledger.database.read(select)

    def _settle(self, rows: list[Values]) -> int:
        try:
            return self._settle_together(rows)
        except Unavailable:
            raise
        except Exception:
            if len(rows) == 1:
                raise
            log.exception("%d orphans could not be settled together", len(rows))
            return sum(self._settle([row]) for row in rows)  # one poison row must not keep the others

    def _settle_together(self, rows: list[Values]) -> int:
        def settle(connection: Connection) -> int:
            finished_at = self._ledger.database.now(connection)
            snapshots = [_interrupted(values, finished_at) for values in rows]
            return self._ledger.books.write(connection, snapshots)

        return self._ledger.database.transaction(settle)


def _owners(connection: Connection) -> dict[int, tuple[int, int]]:
    """By process: how many of its open rows bear no stamp, and how many do."""
    stamped = sa.func.count(LOGS.c.orphaned_at)
    statement = (
        sa.select(LOGS.c.owner, sa.func.count() - stamped, stamped)
        .where(LOGS.c.status == "open")
        .group_by(LOGS.c.owner)
    )
    return {owner: (bare, marked) for owner, bare, marked in connection.execute(statement)}


def _stamp(connection: Connection, owners: set[int], moment: datetime | None) -> None:
    """Marks the open rows of dead processes, or (None) clears the mark of those that live after all."""
    bare = LOGS.c.orphaned_at.is_(None) if moment else LOGS.c.orphaned_at.is_not(None)
    locked = (
        sa.select(LOGS.c.id)
        .where(LOGS.c.status == "open", LOGS.c.owner.in_(owners), bare)
        .order_by(LOGS.c.id)  # the order in which the ledger locks rows
        .with_for_update(key_share=True)
    )
    ids = connection.execute(locked).scalars().all()
    for start in range(0, len(ids), 1000):
        part = ids[start : start + 1000]
        connection.execute(sa.update(RequestLog).where(LOGS.c.id.in_(part)).values(orphaned_at=moment))


def _interrupted(values: Values, finished_at: datetime) -> Snapshot:
    price = Price.from_json(values["price"]) if values["price"] else None
    outcome = {
        "status": "interrupted",
        "swept": True,
        "finished_at": finished_at,
        "cost_nano": costs.cost_nano({**values, "swept": True}, price),
        "error_type": "server_error",
        "error_code": "interrupted",
        "error_message": "The process that served this call died before the call ended.",
    }
    row = Row(values, outcome)
    row.is_open = True
    return Snapshot(row, is_sweep=True)
