"""Rows for the ledger's tables, written past the ledger, for tests of what reads them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from perpetuo.gateway.walk import Gateway
from perpetuo.models import (
    COUNTS,
    LATENCY_BUCKETS,
    SUMS,
    TTFT_BUCKETS,
    RequestLog,
    UsageCounter,
    new_id,
)


def add_log(gateway: Gateway, workspace_id: str, **fields: Any) -> str:
    """One settled row; its id."""
    return add_logs(gateway, workspace_id, [fields])[0]


def add_logs(gateway: Gateway, workspace_id: str, rows: list[dict[str, Any]]) -> list[str]:
    """Many rows in one transaction; their ids."""
    usual = {
        "workspace_id": workspace_id,
        "api_key_id": "key_1",
        "api_key_name": "test",
        "owner": 1,
        "status": "ok",
        "endpoint": "chat.completions",
        "stream": False,
        "http_status": 200,
        "model": "gpt-5",
        "count": 1,
        "swept": False,
    }
    values = [{"id": new_id("req"), "created_at": datetime.now(UTC), **usual, **row} for row in rows]

    def insert(connection: sa.Connection) -> None:
        for row in values:
            connection.execute(sa.insert(RequestLog).values(**row))

    gateway.database.transaction(insert)
    return [row["id"] for row in values]


def add_counter(gateway: Gateway, workspace_id: str, **fields: Any) -> None:
    """One row of usage_counters with one request, in this hour."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usual = {"workspace_id": workspace_id, "hour": hour, "api_key_id": "key_1", "provider": "openai"}
    zeros = dict.fromkeys((*COUNTS, *SUMS, *LATENCY_BUCKETS, *TTFT_BUCKETS), 0)
    values = {**usual, "model": "gpt-5", **zeros, "requests": 1, **fields}
    gateway.database.transaction(
        lambda connection: connection.execute(sa.insert(UsageCounter).values(**values))
    )
