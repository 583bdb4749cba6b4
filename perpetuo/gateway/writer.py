"""The shared commit: one thread per process that writes all rows that wait, in one transaction.

Requests hand over their rows and wait each for its own. Nobody is told "done" before the commit, and a
lone request does not wait for company. Under gevent the thread is a greenlet outside the server's pool, so
that no killed request can take the commit with it. What a commit does, the ledger says.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep

from perpetuo.errors import Unavailable
from perpetuo.gateway.rows import Row, Snapshot, Values

log = logging.getLogger(__name__)

BATCH = 200  # rows a transaction; SQLite takes 32,766 parameters a statement
BATCH_BYTES = 4 * 1024 * 1024  # of bodies in one: it must fit into a transaction's few seconds
LAZY_SECONDS = 0.05  # how long a row that nobody waits for may stay in memory
RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5)  # while the database is away
MOST_WAITING = 10_000  # refusals that wait while it is


class Writer:
    """`commit(snapshots)` writes a batch in one transaction, or raises Unavailable."""

    def __init__(self, commit: Callable[[list[Snapshot]], None], after: Callable[[], None]) -> None:
        self._commit = commit
        self._after = after  # runs behind each commit, when those who waited for it are served
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._urgent: deque[Row] = deque()
        self._lazy: list[Row] = []
        self._thread: threading.Thread | None = None
        self._closing = False
        self.failure: Unavailable | None = None  # why the last commit failed, None while all is well

    @property
    def waiting(self) -> int:
        """How many rows wait for a commit; one that was put twice counts twice."""
        return len(self._urgent) + len(self._lazy)

    def start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
                self._thread.start()

    def put(self, row: Row) -> None:
        """With the next commit."""
        with self._lock:
            if not row.is_queued:
                row.is_queued = True
                self._urgent.append(row)
        self._wake.set()

    def put_lazily(self, row: Row, seconds: float = LAZY_SECONDS) -> bool:
        """With a commit within `seconds`, unless the row is put urgently before.

        False where too many wait already, as they do while the database is away.
        """
        row.due = monotonic() + seconds
        with self._lock:
            if self.failure is not None and len(self._lazy) >= MOST_WAITING:
                return False
            self._lazy.append(row)
            is_first = len(self._lazy) == 1
        if is_first:
            self._wake.set()
        return True

    def withdraw(self, row: Row) -> bool:
        """Takes back a row that was put; False where it was part of a commit and so may be there."""
        with self._lock:
            if row.is_taken:
                return False
            if row.is_queued:
                self._urgent.remove(row)
                row.is_queued = False
            row.is_taken = True  # so that its lazy place is passed over
            return True

    def count(self, row: Row) -> bool:
        """Counts one more call into a row that still waits; False where it is already on its way."""
        with self._lock:
            if not row.is_taken:
                row.opening["count"] += 1
            return not row.is_taken

    def close(self) -> None:
        """Commits what waits, for a moment, and ends the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None

    def _run(self) -> None:
        while True:
            self._wake.wait(self._seconds_until_due())
            self._wake.clear()
            while rows := self._take():
                self._write(rows)
            if self._closing and not (self._urgent or self._lazy):
                return

    def _seconds_until_due(self) -> float | None:
        with self._lock:
            return max(0.0, min(row.due for row in self._lazy) - monotonic()) if self._lazy else None

    def _take(self) -> list[Row]:
        """The rows to write now: those somebody waits for, and the lazy ones whose time has come."""
        rows: list[Row] = []
        size = 0
        with self._lock:
            moment = monotonic()
            for row in [row for row in self._lazy if row.due <= moment or self._closing]:
                if not row.is_taken and not row.is_queued:
                    row.is_queued = True
                    self._urgent.append(row)
            self._lazy = [row for row in self._lazy if not row.is_taken and not row.is_queued]
            while self._urgent and len(rows) < BATCH and (not rows or size < BATCH_BYTES):
                row = self._urgent.popleft()
                row.is_queued, row.is_taken = False, True
                size += row.size
                rows.append(row)
        return rows

    def _write(self, rows: list[Row]) -> None:
        """Returns once each row is written or has failed for good; not while the database is away."""
        for attempt in itertools.count():
            snapshots = [Snapshot(row) for row in rows if not row.is_done]
            try:
                if snapshots:
                    self._commit(snapshots)
            except Unavailable as exc:
                self.failure = exc
                for snapshot in snapshots:
                    snapshot.row.is_uncertain = True
                if self._closing:
                    log.error("%d log rows could not be committed before the end", len(snapshots))
                    return
                sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                rows = self._halve(rows)  # it may have been too large for its time
                continue
            except Exception:
                log.exception("a batch of %d log rows failed; writing them one by one", len(snapshots))
                for snapshot in snapshots:
                    self._write_alone(snapshot.row)
            else:
                self.failure = None
                for snapshot in snapshots:
                    _finish(snapshot)
            break
        for row in rows:
            row.wake()
        self._run_after()

    def _halve(self, rows: list[Row]) -> list[Row]:
        """The first half; the others wait at the head of the queue."""
        half = max(1, len(rows) // 2)
        with self._lock:
            for row in reversed(rows[half:]):
                if not row.is_queued:
                    row.is_queued = True
                    self._urgent.appendleft(row)
        return rows[:half]

    def _write_alone(self, row: Row) -> None:
        """One poison row must not take others with it: it is stored without what a database may refuse.

        Its settle is never given up: in the end it says only that something went wrong.
        """
        row.is_uncertain = True
        failure = Unavailable("The call could not be logged.")
        for spare in (_nothing, _texts, _all_but_its_end):
            while True:
                snapshot = Snapshot(row)
                snapshot.values = {**snapshot.values, **spare(snapshot)}
                try:
                    self._commit([snapshot])
                except Unavailable as exc:
                    self.failure = exc
                    if self._closing:
                        return
                    sleep(RETRY_SECONDS[-1])
                except Exception:
                    log.exception("a log row failed", extra={"request_id": row.id})
                    break
                else:
                    self.failure = None
                    _finish(snapshot)
                    return
        row.failure = failure

    def _run_after(self) -> None:
        try:
            self._after()
        except Exception:  # this thread must outlive whatever it meets
            log.exception("what follows a commit failed")


def _finish(snapshot: Snapshot) -> None:
    row = snapshot.row
    row.is_uncertain = False
    if snapshot.verdict is not None:
        row.verdict = snapshot.verdict
        row.is_open = snapshot.verdict.is_admitted
        row.opening = {**row.opening, **snapshot.verdict.values}
    elif snapshot.is_final:
        row.is_settled = True
        row.opening, row.outcome = {"id": row.id}, {}  # a stream's greenlet may keep the row for long
    else:
        row.is_open = True


def _nothing(_: Snapshot) -> Values:
    return {}


def _texts(snapshot: Snapshot) -> Values:
    texts = ("preview_prompt", "preview_answer", "error_message", "end_user", "attempts", "checks")
    return {name: None for name in (*texts, "request_body", "response_body") if name in snapshot.values}


def _all_but_its_end(snapshot: Snapshot) -> Values:
    if not snapshot.is_final:
        return _texts(snapshot)
    return {
        **_texts(snapshot),
        "status": "error",
        "error_type": "server_error",
        "error_code": "internal_error",
    }
