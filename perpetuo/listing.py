"""Lists: newest first by (created_at, id), a page at a time, found again by an opaque cursor.

A cursor is a place and a direction: `<` older than it, `>` newer, `>=` newer or the place itself.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from perpetuo.columns import UtcDateTime
from perpetuo.errors import InvalidRequest
from perpetuo.fields import moment
from perpetuo.schemas import invalid

DEFAULT_LIMIT = 50
MOST = 200
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Cursor:
    direction: str
    created_at: datetime
    id: str

    def __str__(self) -> str:
        place = [self.direction, self.created_at.isoformat(), self.id]
        return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")

    @property
    def is_backwards(self) -> bool:
        return self.direction != "<"

    def condition(self, created_at: Any, id: Any) -> sa.ColumnElement[bool]:
        """Rows beyond this place, as one comparison that the index serves."""
        place = sa.tuple_(sa.literal(self.created_at, UtcDateTime), sa.literal(self.id))
        return sa.tuple_(created_at, id).bool_op(self.direction)(place)


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    rows: Sequence[Row]
    next: Cursor | None
    prev: Cursor | None

    def body(self, shape: Callable[[Row], Any]) -> dict[str, Any]:
        """The list as it is answered."""
        return {
            "data": [shape(row) for row in self.rows],
            "next_cursor": str(self.next) if self.next else None,
            "prev_cursor": str(self.prev) if self.prev else None,
        }


def read_cursor(text: str | None) -> Cursor | None:
    """Raises InvalidRequest."""
    if not text:
        return None
    try:
        padded = text.encode() + b"=" * (-len(text) % 4)
        direction, created_at, id = json.loads(base64.b64decode(padded, b"-_", validate=True))
        if direction in ("<", ">", ">=") and re.fullmatch(r"[!-~]{1,40}", id):
            return Cursor(direction, moment(created_at), id)
    except (ValueError, TypeError, binascii.Error, RecursionError):
        pass
    raise _bad("cursor", "This cursor is not one of ours.")


def read_limit(text: str | None) -> int:
    """Raises InvalidRequest."""
    if text is None or text == "":
        return DEFAULT_LIMIT
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= MOST:
        raise _bad("limit", f"Must be a whole number from 1 to {MOST}.")
    return int(text)


def _bad(param: str, message: str) -> InvalidRequest:
    return invalid(param, message)


def ordered(query: Any, created_at: Any, id: Any, cursor: Cursor | None) -> Any:
    """`query` from the cursor's place on, in its direction."""
    if cursor is not None:
        query = query.where(cursor.condition(created_at, id))
    if cursor is not None and cursor.is_backwards:
        return query.order_by(created_at, id)
    return query.order_by(created_at.desc(), id.desc())


def page_of(rows: Sequence[Row], cursor: Cursor | None, limit: int, stopped: Any = None) -> Page[Row]:
    """A page of rows that were read in the cursor's direction, one more than `limit` where there are more.

    `stopped` is the row at which a bounded scan ended before it had enough.
    """
    backwards = cursor is not None and cursor.is_backwards
    kept = list(rows[:limit])
    last: Any = kept[-1] if len(rows) > limit else stopped
    onward = Cursor(">" if backwards else "<", last.created_at, last.id) if last is not None else None
    if backwards:
        kept.reverse()
    return Page(kept, *_both(kept, cursor, onward))


def _both(
    kept: list[Any], cursor: Cursor | None, onward: Cursor | None
) -> tuple[Cursor | None, Cursor | None]:
    """(next, prev): the way on as found, and the way back wherever the cursor came from."""
    if cursor is None:
        return onward, None
    if cursor.is_backwards:
        back = kept[-1] if kept else None
        return Cursor("<", *(_place(back) if back else (cursor.created_at, cursor.id))), onward
    if kept:
        return onward, Cursor(">", *_place(kept[0]))
    return onward, Cursor(">=", cursor.created_at, cursor.id)


def _place(row: Any) -> tuple[datetime, str]:
    return row.created_at, row.id
