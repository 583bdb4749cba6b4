"""The ledger: one row a request, opened as the call begins, settled exactly once before its answer ends.

The only writer of `request_logs` and `usage_counters`. Every byte of an answer that a client received
belongs to a committed row, and every answer received in full has its settled row, whatever is killed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from time import monotonic

from sqlalchemy.engine import Connection

from perpetuo.db import Database, storable
from perpetuo.errors import GatewayError, Unavailable
from perpetuo.gateway import statements
from perpetuo.gateway.access import Caller
from perpetuo.gateway.bodies import pack_beside
from perpetuo.gateway.rows import Row, Snapshot
from perpetuo.gateway.statements import CounterKey, Values
from perpetuo.gateway.touches import Touches
from perpetuo.gateway.writer import LAZY_SECONDS, Writer
from perpetuo.liveness import ProcessLock
from perpetuo.models import new_id

log = logging.getLogger(__name__)

ADMISSION_SECONDS = 1.0  # then 503, and nothing is sent upstream
SETTLE_SECONDS = 10.0  # long enough for a restart of PostgreSQL
NO_USAGE: Values = dict.fromkeys(
    ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    + ("cache_write_tokens", "reasoning_tokens", "usage_source")
)
SAMPLED_FROM = 20  # refusals of one key and code within a second that get a row each


class Ledger:
    """The books of one process. Starts with its first row, so that it survives a fork."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.owner = 0
        self.touches = Touches(database)
        self.writer = Writer(self._commit, self.touches.flush)
        self._lock: ProcessLock | None = None
        self._starting = threading.Lock()
        self._refusals: dict[tuple[str, str], tuple[int, int, Row]] = {}

    def start(self) -> None:
        """Takes the lock that says this process lives, before any row names it. Raises Unavailable."""
        if not self._starting.acquire(timeout=ADMISSION_SECONDS):
            raise Unavailable("The database is slow; try again.")
        try:
            if self._lock is None:
                owner = secrets.randbits(62)
                lock = ProcessLock(self.database, owner)
                lock.hold()
                self.owner, self._lock = owner, lock
                self.writer.start()
        finally:
            self._starting.release()

    def keep_lock(self) -> None:
        """Takes the lock again where its connection was lost. Raises Unavailable."""
        if self._lock is not None:
            self._lock.hold()

    def living(self, owners: set[int]) -> set[int]:
        """Which of these processes live. Raises Unavailable."""
        return (self._lock or ProcessLock(self.database, 0)).living(owners)

    def close(self) -> None:
        """Commits what waits and lets go of the lock."""
        self.writer.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def open(self, caller: Caller, values: Values) -> Row:
        """The row of a call that begins; `values` are its first columns.

        Nobody waits for it: it is committed within 50 ms, or with its end where that comes sooner. Only
        while the database is away the call waits, for a second; then Unavailable, and nothing is sent.
        """
        if self._lock is None:
            self.start()
        row = Row(self._opening(caller, values))
        if self.writer.failure is None:
            self.writer.put_lazily(row)
        elif not self._wait(row, ADMISSION_SECONDS, lambda: row.is_open):
            failure = row.failure or self.writer.failure or Unavailable("The database is slow; try again.")
            if not self.writer.withdraw(row):  # it may have been committed: then it says what became of it
                self.settle(row, refusal(failure), waits=False)
            raise failure
        return row

    def ensure_open(self, row: Row) -> None:
        """Returns once the row is committed: before the first byte of a stream. Raises Unavailable."""
        if not row.is_open and not self._wait(row, SETTLE_SECONDS, lambda: row.is_open):
            raise self._unlogged(row)

    def settle(self, row: Row, outcome: Values, *, waits: bool = True) -> None:
        """Writes how the call ended; returns once that is committed, before the answer ends.

        A database away for longer than ten seconds: returns all the same if the open row is committed (the
        settle stays queued until the process dies, then the sweep puts the row right), else Unavailable.
        """
        outcome.setdefault("finished_at", datetime.now(UTC))
        row.outcome = outcome
        self.touches.note(row.opening["api_key_id"], outcome)
        if not waits:
            self.writer.put(row)
        elif not self._wait(row, SETTLE_SECONDS, lambda: row.is_settled) and (row.failure or not row.is_open):
            failure = self._unlogged(row)
            # The client is told so, and its row, once it can be written, must say the same.
            row.outcome = {**outcome, "status": "error", **error_values(failure)}
            raise failure

    def _unlogged(self, row: Row) -> GatewayError:
        """Why this row could not be written: its own fault, or the database's (which may be full)."""
        unlogged = "The database cannot be reached; the call was not logged."
        return row.failure or self.writer.failure or Unavailable(unlogged)

    def refuse(
        self, caller: Caller, error: GatewayError, values: Values, body: bytes | None = None
    ) -> str | None:
        """Logs a call that the gateway refuses; returns its row's id, None for one counted into another's.

        `body` is the client's, where it is to be kept. From the 20th refusal of one key and code within a
        second on they share a row.
        """
        if self._lock is None:
            self.start()
        key, second = (caller.api_key_id, error.code or ""), int(time.time())
        began, count, shared = self._refusals.get(key, (0, 0, None))
        if began == second and shared is not None and count >= SAMPLED_FROM and self.writer.count(shared):
            return None
        count = count + 1 if began == second else 1
        outcome = refusal(error)
        row = Row(self._opening(caller, values), outcome)
        if len(self._refusals) > 10_000:
            self._refusals.clear()
        self._refusals[key] = (second, count, row)
        if body is not None:  # only now, since others may be refused meanwhile
            outcome["request_body"] = pack_beside(self.database.native, body)
        # A shared row goes out once its second is over.
        seconds = LAZY_SECONDS if count < SAMPLED_FROM else second + 1.01 - time.time()
        return row.id if self.writer.put_lazily(row, seconds) else None

    def _opening(self, caller: Caller, values: Values) -> Values:
        return {
            "id": new_id("req"),
            "workspace_id": caller.workspace_id,
            "api_key_id": caller.api_key_id,
            "api_key_name": caller.api_key_name,
            "owner": self.owner,
            "created_at": datetime.now(UTC),
            "status": "open",
            "count": 1,
            **values,
        }

    def _wait(self, row: Row, seconds: float, is_done: Callable[[], bool]) -> bool:
        event, until = row.expect(), monotonic() + seconds
        self.writer.put(row)
        while not is_done():
            if row.failure is not None or not event.wait(until - monotonic()):
                return False
            event.clear()  # it may have told of an earlier commit of the same row
        return True

    def _commit(self, snapshots: list[Snapshot]) -> None:
        self.database.transaction(lambda connection: self.apply(connection, snapshots))

    def apply(self, connection: Connection, snapshots: Sequence[Snapshot]) -> int:
        """Writes a batch inside a transaction, its rows and what they change in the counters; how many rows.

        Exactly once: the counters move by what the transaction really wrote. A row that may be there already
        is read first, under its lock: an open one is settled, a swept one put right by the difference, and
        what is done is dropped. May run twice for one batch, so it leaves the rows in memory alone.
        """
        found = self._found(connection, [s.row.id for s in snapshots if s.may_exist])
        writes = [s for s in snapshots if _is_due(s, found.get(s.row.id))]
        if not writes:
            return 0
        parameters = [statements.row_parameters(self.database, snapshot.values) for snapshot in writes]
        written = self._execute(connection, statements.upsert_rows(len(writes)), parameters)
        ids = {row_id for (row_id,) in written.all()}
        totals: dict[CounterKey, Values] = {}
        for snapshot in writes:
            if snapshot.is_final and snapshot.row.id in ids:
                _move(totals, snapshot, found.get(snapshot.row.id))
        self.move_counters(connection, totals)
        return len(ids)

    def _found(self, connection: Connection, ids: list[str]) -> dict[str, Values]:
        if not ids:
            return {}
        statement = statements.select_rows(len(ids), self.database.for_update)
        rows = self._execute(connection, statement, [ids]).mappings()
        return {row["id"]: dict(row) for row in rows}

    def move_counters(self, connection: Connection, totals: dict[CounterKey, Values]) -> None:
        """Adds to the counters, in their order, what the rows written in this transaction came to."""
        if not totals:
            return
        ordered = sorted(totals.items())  # two processes then never wait for each other
        parameters = [statements.counter_parameters(self.database, *total) for total in ordered]
        self._execute(connection, statements.upsert_counters(len(parameters)), parameters)

    def _execute(self, connection, statement, parameters):  # type: ignore[no-untyped-def]
        return connection.exec_driver_sql(self.database.sql(statement), statements.flat(parameters))


def refusal(error: GatewayError) -> Values:
    """The outcome of a call that the gateway refused: it cost nothing."""
    ended = {"status": "refused", "finished_at": datetime.now(UTC), "cost_nano": 0}
    return {**NO_USAGE, **ended, **error_values(error)}


def error_values(error: GatewayError) -> Values:
    """An error as it stands in a row."""
    return {
        "http_status": error.status,
        "error_type": storable(error.type)[:100],
        "error_code": storable(error.code)[:100] if error.code else None,
        "error_message": storable(error.message),
    }


def _is_due(snapshot: Snapshot, found: Values | None) -> bool:
    """Whether this row still has to be written, given what is in the database (None: it is not there)."""
    if found is None:
        # A row known to be committed that is gone went with its workspace.
        return not snapshot.row.is_open
    if snapshot.is_sweep:
        return found["status"] == "open" and found["orphaned_at"] is not None
    return snapshot.is_final and (found["status"] == "open" or bool(found["swept"]))


def _move(totals: dict[CounterKey, Values], snapshot: Snapshot, found: Values | None) -> None:
    values = snapshot.values
    place = (values["created_at"], values["workspace_id"], values["api_key_id"])
    statements.add(totals, *statements.contribution(*place, values))
    if found is not None and found["status"] != "open":
        statements.add(totals, *statements.contribution(*place, found), sign=-1)
