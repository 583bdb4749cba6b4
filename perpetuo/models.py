"""The six tables. What they promise stands in the ledger's module; here is their shape.

Money is whole nano-dollars (`_nano`), durations whole microseconds (`_us`), times aware UTC (`_at`).
`request_logs` and `usage_counters` carry no foreign keys: the ledger must never wait for a management lock.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from perpetuo.columns import Base, Json, UtcDateTime

STATUSES = ("open", "ok", "error", "refused", "client_closed", "interrupted")
BUDGET_PERIODS = ("day", "week", "month", "total")
BUCKETS = 32  # per histogram; bucket i counts values up to 1.5**i ms, the last one all the rest
BUCKET_RATIO = 1.5


def new_id(kind: str) -> str:
    """An opaque id that sorts by time: 48 bits of milliseconds, 80 random bits."""
    return f"{kind}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def now() -> datetime:
    return datetime.now(UTC)


class User(Base):
    __tablename__ = "users"

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True, default=lambda: new_id("usr"))
    email: Mapped[str] = mapped_column(sa.String(254), unique=True)  # lower case
    name: Mapped[str | None] = mapped_column(sa.String(200))
    password_hash: Mapped[str] = mapped_column(sa.String(200))
    # Part of every session and token; moving it ends them all.
    epoch: Mapped[int] = mapped_column(sa.Integer, default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    # What Flask-Login asks of a user
    is_authenticated = is_active = True
    is_anonymous = False

    def get_id(self) -> str:
        return f"{self.id}:{self.epoch}"


class Workspace(Base):
    __tablename__ = "workspaces"
    __table_args__ = (
        # GET /workspaces: a user's own, newest first
        sa.Index("ix_workspaces_user_id_created_at", "user_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True, default=lambda: new_id("ws"))
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(sa.String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    log_bodies: Mapped[bool] = mapped_column(default=True)
    retention_days: Mapped[int | None]
    pruned_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    routes: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    # Moved by every management write: what the gateway keeps in memory is kept under this number.
    config_version: Mapped[int] = mapped_column(sa.BigInteger, default=1)
    # The ledger's alone:
    monthly_budget_nano: Mapped[int | None] = mapped_column(sa.BigInteger)
    spent_nano: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    held_nano: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    period_start: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Until then spent is summed anew from the counters at each look, see gateway/budgets.py
    recount_until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ProviderKey(Base):
    __tablename__ = "provider_keys"
    __table_args__ = (
        # the gateway's configuration of a workspace, and GET /workspaces/{w}/providers
        sa.Index("ix_provider_keys_workspace_id_created_at", "workspace_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True, default=lambda: new_id("prov"))
    workspace_id: Mapped[str] = mapped_column(sa.ForeignKey("workspaces.id", ondelete="CASCADE"))
    provider: Mapped[str] = mapped_column(sa.String(40))
    name: Mapped[str | None] = mapped_column(sa.String(100))
    base_url: Mapped[str | None] = mapped_column(sa.String(2000))  # as given; None means the provider's own
    resolved_base_url: Mapped[str] = mapped_column(sa.String(2000))  # what the secret is sealed for
    sealed: Mapped[str] = mapped_column(sa.Text)
    hint: Mapped[str] = mapped_column(sa.String(4))
    models: Mapped[list[str] | None] = mapped_column(Json)
    priority: Mapped[int] = mapped_column(default=0)
    weight: Mapped[int] = mapped_column(default=1)
    prices: Mapped[dict[str, Any] | None] = mapped_column(Json)
    enabled: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_error: Mapped[str | None] = mapped_column(sa.String(1000))


class ApiKey(Base):
    __tablename__ = "api_keys"
    __table_args__ = (
        # GET /workspaces/{w}/api-keys; the gateway finds a key by the unique hash
        sa.Index("ix_api_keys_workspace_id_created_at", "workspace_id", "created_at", "id"),
        sa.CheckConstraint("budget_period in ('day', 'week', 'month', 'total')", name="budget_period"),
    )

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True, default=lambda: new_id("key"))
    workspace_id: Mapped[str] = mapped_column(sa.ForeignKey("workspaces.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(sa.String(100))
    prefix: Mapped[str] = mapped_column(sa.String(16))
    hash: Mapped[str] = mapped_column(sa.String(64), unique=True)  # SHA-256, hex
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    models: Mapped[list[str] | None] = mapped_column(Json)
    rpm_limit: Mapped[int | None]
    tpm_limit: Mapped[int | None]
    budget_nano: Mapped[int | None] = mapped_column(sa.BigInteger)
    budget_period: Mapped[str] = mapped_column(sa.String(5), default="month")
    # The ledger's alone:
    spent_nano: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    held_nano: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    period_start: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Until then spent is summed anew from the counters at each look, see gateway/budgets.py
    recount_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # GCRA: when each bucket is full again
    rpm_full_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    tpm_full_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class RequestLog(Base):
    """One row a request: the ledger itself. Written by `gateway/ledger.py` alone."""

    __tablename__ = "request_logs"
    __table_args__ = (
        # the list, newest first, and retention's whole hours
        sa.Index("ix_request_logs_workspace_id_created_at_id", "workspace_id", "created_at", "id"),
        # what is in flight: the sweep's look, and the list with status=open
        sa.Index(
            "ix_request_logs_open",
            "workspace_id",
            "created_at",
            "id",
            postgresql_where=sa.text("status = 'open'"),
            sqlite_where=sa.text("status = 'open'"),
        ),
        sa.CheckConstraint(
            "status in ('open', 'ok', 'error', 'refused', 'client_closed', 'interrupted')", name="status"
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    workspace_id: Mapped[str] = mapped_column(sa.String(40))
    api_key_id: Mapped[str] = mapped_column(sa.String(40))
    api_key_name: Mapped[str] = mapped_column(sa.String(100))
    owner: Mapped[int] = mapped_column(sa.BigInteger)  # the process that opened it, see liveness.py
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    orphaned_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # first seen without a living owner
    status: Mapped[str] = mapped_column(sa.String(13))
    swept: Mapped[bool] = mapped_column(
        default=False
    )  # settled for a dead owner; its own settle still counts
    count: Mapped[int] = mapped_column(default=1)
    endpoint: Mapped[str] = mapped_column(sa.String(20))
    stream: Mapped[bool]
    http_status: Mapped[int | None] = mapped_column(sa.SmallInteger)
    model: Mapped[str] = mapped_column(sa.String(200))  # as asked, '' where that was not legible
    served_model: Mapped[str | None] = mapped_column(sa.String(200))
    provider: Mapped[str | None] = mapped_column(sa.String(40))
    provider_key_id: Mapped[str | None] = mapped_column(sa.String(40))
    end_user: Mapped[str | None] = mapped_column(sa.String(100))
    prompt_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    completion_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    total_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    cached_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    cache_write_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    reasoning_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    usage_source: Mapped[str | None] = mapped_column(sa.String(8))
    latency_us: Mapped[int | None] = mapped_column(sa.BigInteger)
    ttft_us: Mapped[int | None] = mapped_column(sa.BigInteger)
    overhead_us: Mapped[int | None] = mapped_column(sa.BigInteger)
    error_type: Mapped[str | None] = mapped_column(sa.String(100))
    error_code: Mapped[str | None] = mapped_column(sa.String(100))
    error_message: Mapped[str | None] = mapped_column(sa.Text)
    attempts: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)
    # Money and limits: fixed at open
    price: Mapped[dict[str, Any] | None] = mapped_column(Json)  # resolved unit prices
    hold_nano: Mapped[int | None] = mapped_column(sa.BigInteger)
    key_period: Mapped[datetime | None] = mapped_column(UtcDateTime)  # in which the hold was taken
    workspace_period: Mapped[datetime | None] = mapped_column(UtcDateTime)
    token_advance_us: Mapped[int | None] = mapped_column(sa.BigInteger)  # trued up at settle
    checks: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)
    # and at settle
    cost_nano: Mapped[int | None] = mapped_column(sa.BigInteger)
    preview_prompt: Mapped[str | None] = mapped_column(sa.String(200))
    preview_answer: Mapped[str | None] = mapped_column(sa.String(200))
    # Last, so that a narrow read does not pass them; written at settle only, see gateway/bodies.py
    request_body: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    response_body: Mapped[bytes | None] = mapped_column(sa.LargeBinary)


LATENCY_BUCKETS = tuple(f"latency_{i:02}" for i in range(BUCKETS))
TTFT_BUCKETS = tuple(f"ttft_{i:02}" for i in range(BUCKETS))
COUNTS = ("requests", "errors", "refused", "client_closed", "unpriced_requests")
SUMS = ("prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens", "cost_nano")


class UsageCounter(Base):
    """Sums of the settled rows of one hour, key, provider and model; '' stands for none.

    The primary key serves every question of GET /workspaces/{w}/usage: a workspace, a span of hours.
    """

    __table__ = sa.Table(
        "usage_counters",
        Base.metadata,
        sa.Column("workspace_id", sa.String(40), primary_key=True),
        sa.Column("hour", UtcDateTime, primary_key=True),  # of the row's created_at
        sa.Column("api_key_id", sa.String(40), primary_key=True),
        sa.Column("provider", sa.String(40), primary_key=True),
        sa.Column("model", sa.String(200), primary_key=True),  # served, else asked, '' for refusals
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in COUNTS + SUMS),
        *(sa.Column(name, sa.Integer, nullable=False) for name in LATENCY_BUCKETS + TTFT_BUCKETS),
    )
