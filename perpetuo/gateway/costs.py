"""What one row costs: the price that counts for it, and its cost from the usage and the price in it.

The row is all that a cost depends on, so that the audit and a person can work it out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping

from perpetuo.gateway.intake import Asked
from perpetuo.gateway.router import Target
from perpetuo.price_list import context_of, price_for
from perpetuo.pricing import Cost, Price, cost
from perpetuo.providers.base import Usage
from perpetuo.wire import usd

Columns = Mapping[str, Any] | RowMapping  # of a row, by name


def price_of(target: Target, asked: Asked, at: datetime, dropped: Sequence[str] = ()) -> Price | None:
    """The price of a call opened `at` and answered by `target`; None where none is known.

    `dropped` are the parameters that this target was not sent: what it was not asked for it does not bill.
    """
    fields = asked.fields
    if dropped:
        fields = {name: value for name, value in fields.items() if name not in dropped}
    return price_for(target.key.provider, target.model, target.key.prices, at, context_of(fields))


def cost_nano(row: Columns, price: Price | None) -> int | None:
    """What a settled row comes to; None where it used tokens that have no known price.

    `row` has its usage columns, `swept` and `hold_nano`.
    """
    if _is_held(row):
        held: int = row["hold_nano"]
        return held
    if row["usage_source"] is None:
        return 0
    return None if price is None else _cost(row, price).nano


def arithmetic(row: Columns, price: Price | None) -> list[dict[str, Any]]:
    """How `cost_nano` came about: a line for each class of tokens, or one for the hold."""
    if _is_held(row):
        return [{"class": "hold", "tokens": None, "usd_per_million": None, "usd": usd(row["hold_nano"])}]
    if row["usage_source"] is None or row["status"] == "open" or price is None:
        return []
    return _cost(row, price).arithmetic()


def _is_held(row: Columns) -> bool:
    """A call whose process died costs its upper bound: nobody knows what the upstream billed."""
    return bool(row["swept"]) and row["hold_nano"] is not None


def _cost(row: Columns, price: Price) -> Cost:
    usage = Usage(
        row["prompt_tokens"] or 0,
        row["completion_tokens"] or 0,
        row["total_tokens"] or 0,
        row["cached_tokens"] or 0,
        row["cache_write_tokens"] or 0,
    )
    return cost(usage, price)
