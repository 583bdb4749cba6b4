"""The engines of both databases: how a connection is set up, and how waits for it end.

Two for each database: one that only reads, in autocommit, and one that writes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import psycopg2
import psycopg2.extensions
import sqlalchemy as sa
from gevent.socket import wait_read, wait_write
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

from perpetuo.native import is_patched

IDLE_MS = 5_000
POOL_SECONDS = 1.0  # a request that waits longer for a connection is answered 503
STATEMENT_TIMEOUT_MS = 10_000  # the server's own bound, for a process that cannot keep its own


def sqlite_engine(url: URL, *, read_only: bool, pooled: bool = True) -> Engine:
    """WAL, FULL, and a writer whose transactions begin as such."""
    pool: dict[str, Any] = {"poolclass": sa.NullPool}
    if read_only and pooled:
        pool = {"pool_size": 5, "max_overflow": 10, "pool_timeout": POOL_SECONDS}
    engine = sa.create_engine(url, connect_args={"check_same_thread": False}, hide_parameters=True, **pool)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we begin by hand: sqlite3's own BEGIN is deferred
        # FULL: the row is the ledger, and WAL with NORMAL may lose the last commits on power loss.
        for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"pragma {pragma}")
        if read_only:
            connection.execute("pragma query_only=ON")

    if not read_only:

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A deferred transaction that turns from reading to writing fails at once, whatever the timeout.
            connection.exec_driver_sql("begin immediate")

    return engine


def postgresql_engine(url: URL, *, read_only: bool) -> Engine:
    """psycopg2 with bounded waits, cooperative under gevent."""
    if is_patched():
        psycopg2.extensions.set_wait_callback(_wait)
    options = [f"statement_timeout={STATEMENT_TIMEOUT_MS}", "timezone=UTC", "tcp_user_timeout=20000"]
    options += ["tcp_keepalives_idle=10", "tcp_keepalives_interval=5", "tcp_keepalives_count=3"]
    # A frozen process must not hold its locks for ever: the others' rows wait for them.
    options += (
        ["default_transaction_read_only=on"]
        if read_only
        else [f"idle_in_transaction_session_timeout={IDLE_MS}"]
    )
    engine = sa.create_engine(
        url,
        hide_parameters=True,  # prompts and hashes have no place in a traceback
        pool_size=5,
        max_overflow=10,
        pool_timeout=POOL_SECONDS,
        connect_args={
            "connect_timeout": 2,
            "application_name": "perpetuo",
            "options": " ".join(f"-c {option}" for option in options),
        },
    )
    return engine.execution_options(isolation_level="AUTOCOMMIT") if read_only else engine


_clock = threading.local()  # greenlet-local under gevent


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within it no wait for PostgreSQL outlasts `seconds`, in this thread or greenlet."""
    outer = getattr(_clock, "until", None)
    _clock.until = monotonic() + seconds
    try:
        yield
    finally:
        _clock.until = outer


def is_late() -> bool:
    """Whether the deadline around us has passed."""
    return monotonic() >= _clock.until


def _wait(connection: Any) -> None:
    """psycopg2's wait callback under gevent: others run meanwhile, and no wait outlasts its deadline.

    libpq's own connect_timeout is ignored once a callback is set, so the deadline covers connecting too.
    """
    until = getattr(_clock, "until", None) or monotonic() + STATEMENT_TIMEOUT_MS / 1000
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        wait = wait_read if state == psycopg2.extensions.POLL_READ else wait_write
        try:
            wait(connection.fileno(), timeout=max(until - monotonic(), 0.001))
        except TimeoutError as exc:
            raise psycopg2.OperationalError("the database is silent") from exc
