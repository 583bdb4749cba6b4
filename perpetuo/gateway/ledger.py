"""The ledger: one row a request, opened as the call begins, settled exactly once before its answer ends.

The only writer of `request_logs` and `usage_counters`. Every byte of an answer that a client received
belongs to a committed row, and every answer received in full has its settled row, whatever is killed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic

from perpetuo.db import Database, storable
from perpetuo.errors import GatewayError, Unavailable
from perpetuo.gateway.access import Caller
from perpetuo.gateway.bodies import pack_beside
from perpetuo.gateway.books import Books, LimitsOf, anyone
from perpetuo.gateway.limits import Ask, Verdict
from perpetuo.gateway.rows import Row, Snapshot, Values
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
LOOK_SECONDS = 0.25  # how often a call that waits for held money looks whether another process gave it back
SAMPLED_FROM = 20  # refusals of one key and code within a second that get a row each


Wait = Callable[[threading.Event, float], None]


class Refusal(GatewayError):
    """What the limits refuse: a verdict's error, with its arithmetic and the headers about the limits."""

    def __init__(self, verdict: Verdict) -> None:
        error = verdict.error
        assert error is not None
        headers = {**verdict.headers, **error.headers}
        super().__init__(
            error.message, status=error.status, type=error.type, code=error.code, headers=headers
        )
        self.checks = verdict.checks


class Ledger:
    """The books of one process. Starts with its first row, so that it survives a fork."""

    def __init__(self, database: Database, limits_of: LimitsOf = anyone, public_url: str = "") -> None:
        """`limits_of(api_key_id)` says whether that key, and whether its workspace, may have a budget or
        limits; `public_url` is where their pages are."""
        self.database = database
        self.books = Books(database, limits_of, public_url)
        self._waiting: set[threading.Event] = set()  # calls that wait for held money
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
            raise self._not_opened(row)
        return row

    def _not_opened(self, row: Row) -> GatewayError:
        failure = row.failure or self.writer.failure or Unavailable("The database is slow; try again.")
        if not self.writer.withdraw(row):  # it may have been committed: then it says what became of it
            self.settle(row, refusal(failure), waits=False)
        return failure

    def admit(self, caller: Caller, values: Values, ask: Ask, patience: float, wait: Wait) -> Row:
        """The row of a call that has a budget or limits: committed, with what it holds, when this returns.

        While only held money is in the way it asks again for `patience` seconds, pausing with
        `wait(event, seconds)`, which may raise. Raises what the limits refuse (`checks` are in the error's
        verdict), and Unavailable.
        """
        if self._lock is None:
            self.start()
        row = Row(self._opening(caller, values), ask=ask)
        until = monotonic() + patience
        while True:
            row.ask_again()
            if not self._wait(row, ADMISSION_SECONDS, lambda: row.verdict is not None):
                raise self._not_opened(row)
            verdict = row.decided
            if verdict.error is not None:
                raise Refusal(verdict)
            if verdict.is_admitted:
                return row
            if monotonic() >= until:
                row.ask = ask.impatient()
            else:
                self._await_release(wait, until - monotonic())

    def _await_release(self, wait: Wait, seconds: float) -> None:
        """Until a call of this process has settled; other processes' are seen by looking now and then."""
        event = threading.Event()
        self._waiting.add(event)
        try:
            wait(event, min(seconds, LOOK_SECONDS))
        finally:
            self._waiting.discard(event)

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
        self.database.transaction(lambda connection: self.books.write(connection, snapshots))
        if self._waiting and any(snapshot.is_final for snapshot in snapshots):
            for event in list(self._waiting):
                event.set()


def refusal(error: GatewayError) -> Values:
    """The outcome of a call that the gateway refused: it cost nothing."""
    ended = {"status": "refused", "finished_at": datetime.now(UTC), "cost_nano": 0}
    if error.code == "client_closed":  # it left while it waited to be let in
        return {**NO_USAGE, **ended, "status": "client_closed"}
    return {**NO_USAGE, **ended, **error_values(error)}


def error_values(error: GatewayError) -> Values:
    """An error as it stands in a row."""
    return {
        "http_status": error.status,
        "error_type": storable(error.type)[:100],
        "error_code": storable(error.code)[:100] if error.code else None,
        "error_message": storable(error.message),
    }
