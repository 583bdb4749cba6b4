"""Prices calls that had no known price when they were settled, once there is one; nothing else is touched.

Each row and what it moves in the counters are one transaction, so that a second run finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.gateway import budgets, costs, statements
from perpetuo.gateway.audit import AUDIT_SECONDS
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.statements import COUNTED, CounterKey, Values
from perpetuo.models import ProviderKey, RequestLog
from perpetuo.price_list import Overrides, price_for
from perpetuo.pricing import Price

LOGS = RequestLog.__table__
PAGE = 5000
BATCH = 200  # a short transaction, so that calls commit in between
UNPRICED = sa.and_(LOGS.c.status != "open", LOGS.c.cost_nano.is_(None))
SET = (
    sa.update(RequestLog)
    .where(LOGS.c.id == sa.bindparam("row_id"), UNPRICED)
    .values(price=sa.bindparam("new_price"), cost_nano=sa.bindparam("new_nano"))
)


def reprice(ledger: Ledger) -> int:
    """Prices what had no price, as of each call's own time and by the provider key's own prices of today;
    how many rows. Raises Unavailable; what is committed by then stays.
    """
    statement = sa.select(ProviderKey.id, ProviderKey.prices)
    stored = ledger.database.read(lambda connection: connection.execute(statement).all())
    overrides = {key_id: Overrides(prices) for key_id, prices in stored}
    repriced = 0
    for page in _pages(ledger.database):
        found = [(row.id, price) for row in page if (price := _price(row, overrides))]
        for start in range(0, len(found), BATCH):
            prices = dict(found[start : start + BATCH])
            repriced += ledger.database.transaction(lambda connection: _write(ledger, connection, prices))  # noqa: B023
    return repriced


def _pages(database: Database) -> Iterator[list[Any]]:
    names = ("id", "created_at", "provider", "provider_key_id", "served_model")
    columns = [LOGS.c[name] for name in names]
    last = ""
    while True:
        statement = sa.select(*columns).where(UNPRICED, LOGS.c.id > last).order_by(LOGS.c.id).limit(PAGE)
        page = database.snapshot(lambda connection: list(connection.execute(statement)), AUDIT_SECONDS)  # noqa: B023
        if not page:
            return
        yield page
        last = page[-1].id


def _price(row: Any, overrides: dict[str, Overrides]) -> Price | None:
    if row.provider is None or row.served_model is None:
        return None
    return price_for(row.provider, row.served_model, overrides.get(row.provider_key_id), row.created_at)


def _write(ledger: Ledger, connection: Connection, prices: dict[str, Price]) -> int:
    """Writes the rows that still have no price, locked in the ledger's order, and moves the counters."""
    owners = connection.execute(
        sa.select(LOGS.c.api_key_id, LOGS.c.workspace_id).where(LOGS.c.id.in_(prices))
    )
    keys, workspaces = zip(*owners, strict=True)
    budgets.recount(connection, ledger.database.now(connection), keys, workspaces)
    names = ("id", "workspace_id", "api_key_id", "created_at", "swept", "hold_nano", "usage_source")
    columns = [LOGS.c[name] for name in (*names, "cache_write_tokens", *COUNTED)]
    locked = sa.select(*columns).where(UNPRICED, LOGS.c.id.in_(prices)).order_by(LOGS.c.id)
    rows = connection.execute(locked.with_for_update(key_share=True)).mappings().all()
    totals: dict[CounterKey, Values] = {}
    written = []
    for row in rows:
        price = prices[row["id"]]
        nano = costs.cost_nano(row, price)
        written.append({"row_id": row["id"], "new_price": price.to_json(), "new_nano": nano})
        place = (row["created_at"].astimezone(UTC), row["workspace_id"], row["api_key_id"])
        statements.add(totals, *statements.contribution(*place, dict(row)), sign=-1)
        statements.add(totals, *statements.contribution(*place, {**row, "cost_nano": nano}))
    if written:
        connection.execute(SET, written)
        ledger.books.move_counters(connection, totals)
    return len(written)
