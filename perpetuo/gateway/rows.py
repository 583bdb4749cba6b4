"""A log row on its way to the database, and how it stands at one moment. What is written, the ledger says."""

from __future__ import annotations

import threading
from typing import Any

from perpetuo.errors import GatewayError
from perpetuo.gateway.limits import Ask, Verdict

Values = dict[str, Any]


class Row:
    """One log row on its way to the database: how it was opened and, once known, how it ended."""

    __slots__ = (
        "opening",
        "outcome",
        "is_open",
        "is_settled",
        "is_uncertain",
        "is_queued",
        "is_taken",
        "due",
        "failure",
        "ask",
        "verdict",
        "_done",
    )

    def __init__(self, opening: Values, outcome: Values | None = None, ask: Ask | None = None) -> None:
        self.opening = opening
        self.outcome = outcome
        self.is_open = False  # committed as open
        self.is_settled = False  # committed in its final state
        self.is_uncertain = False  # a commit with this row failed midway: it may be there
        self.is_queued = False  # waits for the next commit
        self.is_taken = False  # was part of a commit, be it a failed one
        self.due = 0.0
        self.failure: GatewayError | None = None
        self.ask = ask  # what it needs of budgets and limits before it may be opened
        self.verdict: Verdict | None = None
        self._done: threading.Event | None = None

    @property
    def id(self) -> str:
        row_id: str = self.opening["id"]
        return row_id

    @property
    def is_ending(self) -> bool:
        """Whether its outcome is known, be it committed or not."""
        return self.outcome is not None

    @property
    def is_done(self) -> bool:
        """Whether the database has all that is known of it."""
        return self.is_settled or (self.outcome is None and (self.is_open or self.verdict is not None))

    @property
    def decided(self) -> Verdict:
        """What the limits say, once they have."""
        assert self.verdict is not None
        return self.verdict

    def ask_again(self) -> None:
        """Forgets an earlier verdict: it was not admitted, so nothing of it was written."""
        self.verdict, self.is_taken = None, False

    @property
    def size(self) -> int:
        """Bytes of its bodies."""
        outcome = self.outcome or {}
        return len(outcome.get("request_body") or b"") + len(outcome.get("response_body") or b"")

    def expect(self) -> threading.Event:
        """An event that is set once what stands in the row now is committed, or has failed for good."""
        self._done = threading.Event()
        return self._done

    def wake(self) -> None:
        if self._done is not None:
            self._done.set()


class Snapshot:
    """A row as it stands when its batch is made: requests go on changing theirs meanwhile."""

    __slots__ = ("row", "values", "ask", "verdict", "is_final", "may_exist", "is_sweep")

    def __init__(self, row: Row, *, is_sweep: bool = False) -> None:
        outcome = row.outcome
        self.row = row
        self.is_sweep = is_sweep  # written for an owner that is gone
        self.ask = row.ask if outcome is None else None
        self.verdict: Verdict | None = None
        self.values = row.opening if outcome is None else {**row.opening, **outcome}
        self.is_final = outcome is not None
        self.may_exist = row.is_open or row.is_uncertain
