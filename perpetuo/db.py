"""The database: its engines, reads and transactions, and every difference between PostgreSQL and SQLite.

Reads go through a read-only pool in autocommit. Writes go through `transaction`: on PostgreSQL a
connection of a second pool, on SQLite one native thread per process under a file lock, so that neither
fsync nor another process's lock ever stops the event loop; nor does `read_many`, for what is not short.
`db` (Flask-SQLAlchemy) shares the read pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from perpetuo.columns import Base
from perpetuo.db_errors import CommitUncertain, translated
from perpetuo.engines import deadline, is_late, postgresql_engine, sqlite_engine
from perpetuo.native import Native, breathe, locked_file

T = TypeVar("T")

READ_SECONDS = 1.0  # a request that waits longer for the database is answered 503
READ_MANY_SECONDS = 8.0
ROWS = 200  # made of PostgreSQL's answer at a time
STEPS = 100_000  # of SQLite's machine between two looks at the clock: one to five milliseconds
WRITE_SECONDS = 5.0
MIGRATION_LOCK = 0x7065727065747565  # "perpetue": any constant, the same for all


def storable(text: str) -> str:
    """`text` with what a database refuses (NUL, lone surrogates) written as an escape."""
    if "\0" in text:
        text = text.replace("\0", "\\u0000")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


class Database:
    """One database, used by one process. Opens nothing before its first use, so that it survives a fork."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.path = Path(url.database or "") if self.is_sqlite else None
        make = sqlite_engine if self.is_sqlite else postgresql_engine
        self.reader = make(url, read_only=True)
        self.writer = make(url, read_only=False)
        # SQLite's connections are used in one thread at a time, so the threads have their own.
        self.long_reader = self.reader
        if self.is_sqlite:
            self.long_reader = sqlite_engine(url, read_only=True, pooled=False)
        self.native = Native()
        self._mutex = threading.Lock()
        self._held: Connection | None = None

    def read(self, work: Callable[[Connection], T], seconds: float = READ_SECONDS) -> T:
        """`work(connection)` in autocommit, within `seconds`; once more where the connection was stale.

        Raises Unavailable.
        """
        with deadline(seconds), translated():
            try:
                with self.reader.connect() as connection:
                    return work(connection)
            except DBAPIError as exc:
                if not exc.connection_invalidated or is_late():
                    raise
            with self.reader.connect() as connection:
                return work(connection)

    def read_many(self, work: Callable[[Connection], T], seconds: float = READ_MANY_SECONDS) -> T:
        """The same for what may look at many rows: beside the event loop, which `read` stops on SQLite.

        There `work` runs in a native thread, and may wait for nothing else. Raises Unavailable.
        """
        if not self.is_sqlite:
            return self.read(work, seconds)
        until = monotonic() + seconds
        with translated():
            return self.native.reading(self._sqlite_read, work, until, seconds=seconds)

    def all(self, connection: Connection, query: Any) -> list[sa.Row[Any]]:
        """The rows of a `read_many`. PostgreSQL's are made in pieces, between which others run."""
        result = connection.execute(query)
        if self.is_sqlite:
            return list(result.all())
        rows: list[sa.Row[Any]] = []
        for piece in result.partitions(ROWS):
            rows += piece
            breathe()
        return rows

    def snapshot(self, work: Callable[[Connection], T], seconds: float) -> T:
        """`work(connection)` on one unchanging picture of the database. Raises Unavailable."""
        with deadline(seconds), translated(), self.reader.connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("begin")  # its pictures are snapshots anyway
                try:
                    return work(connection)
                finally:
                    connection.exec_driver_sql("rollback")
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                connection.exec_driver_sql(f"set local statement_timeout = {int(seconds * 1000)}")
                return work(connection)

    def transaction(self, work: Callable[[Connection], T], seconds: float = WRITE_SECONDS) -> T:
        """`work(connection)` in one transaction, committed when this returns.

        It may be called twice where a stale connection was found before COMMIT. Raises Unavailable,
        CommitUncertain, and IntegrityError as it comes.
        """
        if self.is_sqlite:
            with translated():  # a lock that another process holds for too long
                until = monotonic() + seconds
                return self.native.writing(self._sqlite_transaction, work, until, seconds=seconds)
        with deadline(seconds), translated():
            try:
                return self._postgresql_transaction(work)
            except DBAPIError as exc:
                if not exc.connection_invalidated or is_late():
                    raise
            return self._postgresql_transaction(work)

    def save(self, work: Callable[[Session], T]) -> T:
        """The same with an ORM session, for management records; they stay readable afterwards."""

        def with_session(connection: Connection) -> T:
            with Session(bind=connection, expire_on_commit=False) as session:
                result = work(session)
                session.flush()
                session.expunge_all()
                return result

        return self.transaction(with_session)

    def _postgresql_transaction(self, work: Callable[[Connection], T]) -> T:
        with self.writer.connect() as connection:
            transaction = connection.begin()
            with transaction:
                result = work(connection)
                try:
                    transaction.commit()
                except DBAPIError as exc:
                    raise CommitUncertain("The database was lost while committing.") from exc
            return result

    def _sqlite_transaction(self, work: Callable[[Connection], T], until: float) -> T:
        """In the writer's native thread. The file lock queues processes fairly, SQLite's does not."""
        assert self.path is not None
        with self._mutex, translated(), locked_file(Path(f"{self.path}.writer")):
            if monotonic() > until:  # whoever waited for this was told that it failed
                raise TimeoutError("the file was locked for too long")
            if self._held is None or self._held.closed:
                self._held = self.writer.connect()
            with self._held.begin():
                return work(self._held)

    def _sqlite_read(self, work: Callable[[Connection], T], until: float) -> T:
        """In a native thread. Ends with its time even where nobody waits for it any more."""
        with translated(), self.long_reader.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.set_progress_handler(lambda: monotonic() > until, STEPS)
            return work(connection)

    def now(self, connection: Connection) -> datetime:
        """The database's clock in UTC; on SQLite the process's."""
        if self.is_sqlite:
            return datetime.now(UTC)
        moment: datetime = connection.exec_driver_sql("select clock_timestamp()").scalar_one()
        return moment.astimezone(UTC)

    def time(self, moment: datetime) -> datetime | str:
        """`moment` as a parameter of hand-written SQL."""
        if self.is_sqlite:
            return moment.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
        return moment

    def moment(self, value: Any) -> datetime | None:
        """A time that hand-written SQL has read."""
        if value is None:
            return None
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        moment: datetime = value.astimezone(UTC)
        return moment

    def sql(self, statement: str) -> str:
        """Hand-written SQL with `%s` for each parameter, in this database's own style."""
        return statement.replace("%s", "?") if self.is_sqlite else statement

    @property
    def for_update(self) -> str:
        """Appended to a select that locks its rows; SQLite's writer holds the whole file already."""
        return "" if self.is_sqlite else " for no key update"

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection for migrations, under a lock that holds every other migrating process back."""
        if self.is_sqlite:
            assert self.path is not None
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with translated():
                self.path.touch(mode=0o600)  # prompts will be in it; SQLite's other files take its mode
            with (
                translated(),
                locked_file(Path(f"{self.path}.migrating")),
                self.writer.connect() as connection,
            ):
                yield connection
            return
        with translated(), self.writer.connect() as connection:
            connection.exec_driver_sql("set statement_timeout = 0")
            connection.exec_driver_sql(f"select pg_advisory_lock({MIGRATION_LOCK})")
            connection.commit()
            try:
                yield connection
            finally:
                connection.rollback()
                connection.exec_driver_sql(f"select pg_advisory_unlock({MIGRATION_LOCK})")
                connection.invalidate()  # its session settings are a migration's, not a request's

    def connections(self) -> dict[str, tuple[int, int]]:
        """By pool how many connections are in use, and how many are open."""
        pools = {"read": self.reader.pool, "write": self.writer.pool}
        queues = {name: pool for name, pool in pools.items() if isinstance(pool, sa.QueuePool)}
        return {n: (pool.checkedout(), pool.checkedout() + pool.checkedin()) for n, pool in queues.items()}

    def revision(self) -> str | None:
        """The schema's revision, None before the first migration. Raises Unavailable."""

        def current(connection: Connection) -> str | None:
            if self.path is not None and not self.path.exists():  # deleted under us: SQLite would not notice
                return None
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            return connection.exec_driver_sql("select version_num from alembic_version").scalar()

        return self.read(current)

    def close(self) -> None:
        """Closes every connection and thread of this process."""
        if self._held is not None:
            with suppress(TimeoutError):
                self.native.writing(self._held.close, seconds=WRITE_SECONDS)
            self._held = None
        self.reader.dispose()
        self.writer.dispose()
        self.native.close()


class _SharedSQLAlchemy(SQLAlchemy):
    """Flask-SQLAlchemy on our read pool: `db.session` reads, `Database.save` writes."""

    def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        return app.extensions["perpetuo"].database.reader


db = _SharedSQLAlchemy(model_class=Base)
