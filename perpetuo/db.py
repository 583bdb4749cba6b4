"""The database: two engines, `read` and `transaction`, and every difference between PostgreSQL and SQLite.

Reads go through a read-only pool in autocommit. Writes go through `transaction`: on PostgreSQL a
connection of a second pool, on SQLite one native thread per process under a file lock, so that neither
fsync nor another process's lock ever stops the event loop. `db` (Flask-SQLAlchemy) shares the read pool.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import orjson
import psycopg2
import psycopg2.extensions
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from gevent.monkey import is_module_patched
from gevent.socket import wait_read, wait_write
from gevent.threadpool import ThreadPool
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Session

from perpetuo.errors import Unavailable

T = TypeVar("T")

READ_SECONDS = 1.0  # a request that waits longer for the database is answered 503
WRITE_SECONDS = 5.0
STATEMENT_TIMEOUT_MS = 10_000  # the server's own bound, for a process that cannot keep its own
MIGRATION_LOCK = 0x7065727065747565  # "perpetue": any constant, the same for all


class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class UtcDateTime(sa.types.TypeDecorator):
    """An aware time in UTC: `timestamptz` on PostgreSQL, text of fixed width on SQLite, so that it sorts."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Json(sa.types.TypeDecorator):
    """A JSON value as text on both databases: PostgreSQL's jsonb would refuse an escaped NUL."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else orjson.dumps(value).decode()

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else orjson.loads(value)


def storable(text: str) -> str:
    """`text` with what a database refuses (NUL, lone surrogates) written as an escape."""
    if "\0" in text:
        text = text.replace("\0", "\\u0000")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


class CommitUncertain(Unavailable):
    """The connection was lost in COMMIT: the transaction may or may not be there."""


class Database:
    """One database, used by one process. Opens nothing before its first use, so that it survives a fork."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.path = Path(url.database or "") if self.is_sqlite else None
        make = _sqlite_engine if self.is_sqlite else _postgresql_engine
        self.reader = make(url, read_only=True)
        self.writer = make(url, read_only=False)
        self.native = Native()
        self._mutex = threading.Lock()
        self._held: Connection | None = None

    def read(self, work: Callable[[Connection], T], seconds: float = READ_SECONDS) -> T:
        """`work(connection)` in autocommit, within `seconds`; once more where the connection was stale.

        Raises Unavailable.
        """
        with _deadline(seconds), _translated():
            try:
                with self.reader.connect() as connection:
                    return work(connection)
            except DBAPIError as exc:
                if not exc.connection_invalidated or _is_late():
                    raise
            with self.reader.connect() as connection:
                return work(connection)

    def snapshot(self, work: Callable[[Connection], T], seconds: float) -> T:
        """`work(connection)` on one unchanging picture of the database. Raises Unavailable."""
        with _deadline(seconds), _translated(), self.reader.connect() as connection:
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
            return self.native.writing(self._sqlite_transaction, work)
        with _deadline(seconds), _translated():
            try:
                return self._postgresql_transaction(work)
            except DBAPIError as exc:
                if not exc.connection_invalidated or _is_late():
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

    def _sqlite_transaction(self, work: Callable[[Connection], T]) -> T:
        """In the writer's native thread. The file lock queues processes fairly, SQLite's does not."""
        assert self.path is not None
        with self._mutex, _translated(), locked_file(Path(f"{self.path}.writer")):
            if self._held is None or self._held.closed:
                self._held = self.writer.connect()
            with self._held.begin():
                return work(self._held)

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
            with locked_file(Path(f"{self.path}.migrating")), self.writer.connect() as connection:
                yield connection
            return
        with self.writer.connect() as connection:
            connection.exec_driver_sql("set statement_timeout = 0")
            connection.exec_driver_sql(f"select pg_advisory_lock({MIGRATION_LOCK})")
            connection.commit()
            try:
                yield connection
            finally:
                connection.rollback()
                connection.exec_driver_sql(f"select pg_advisory_unlock({MIGRATION_LOCK})")
                connection.invalidate()  # its session settings are a migration's, not a request's

    def revision(self) -> str | None:
        """The schema's revision, None before the first migration. Raises Unavailable."""

        def current(connection: Connection) -> str | None:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            return connection.exec_driver_sql("select version_num from alembic_version").scalar()

        return self.read(current)

    def close(self) -> None:
        """Closes every connection and thread of this process."""
        if self._held is not None:
            self.native.writing(self._held.close)
            self._held = None
        self.reader.dispose()
        self.writer.dispose()
        self.native.close()


class Native:
    """Native threads for what would stop the event loop: SQLite's commits and slow hashes.

    Under gevent one thread each; elsewhere the call runs where it is.
    """

    def __init__(self) -> None:
        self._pools: dict[str, ThreadPool] = {}
        self._pid = os.getpid()

    def writing(self, call: Callable[..., T], *args: Any) -> T:
        return self._run("writing", call, args)

    def slow(self, call: Callable[..., T], *args: Any) -> T:
        return self._run("slow", call, args)

    def _run(self, name: str, call: Callable[..., T], args: tuple[Any, ...]) -> T:
        if not is_patched():
            return call(*args)
        if self._pid != os.getpid():  # pools do not survive a fork
            self._pools, self._pid = {}, os.getpid()
        if name not in self._pools:
            self._pools[name] = ThreadPool(1)
        result, error = self._pools[name].apply(_caught, (call, args))
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        for pool in self._pools.values():
            pool.kill()
        self._pools = {}


def _caught(call: Callable[..., T], args: tuple[Any, ...]) -> tuple[T | None, BaseException | None]:
    """gevent prints every exception of its thread pool to stderr, so it travels as a value."""
    try:
        return call(*args), None
    except BaseException as exc:  # noqa: BLE001
        return None, exc


def is_patched() -> bool:
    """Whether this process runs on gevent."""
    return is_module_patched("socket")


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; it ends with the process, whatever kills it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class ProcessLock:
    """Says which processes live: each holds a lock named by its random number, and its death releases it.

    PostgreSQL: a session's advisory lock on a connection of its own. SQLite: a locked file beside the
    database. Both are read without being taken.
    """

    def __init__(self, database: Database, owner: int) -> None:
        self.owner = owner
        self._database = database
        self._connection: Any = None
        self._handle: int | None = None

    def hold(self) -> None:
        """Takes the lock, or takes it again after a lost connection. Raises Unavailable."""
        if self._database.is_sqlite:
            while self._handle is None:
                self._handle = self._lock_file()
            return
        with _deadline(READ_SECONDS), _translated():
            try:
                if self._connection is not None:
                    self._connection.exec_driver_sql("select 1")
                    return
            except DBAPIError:
                self.release()
            self._connection = self._database.writer.execution_options(isolation_level="AUTOCOMMIT").connect()
            self._connection.detach()  # lives and dies with this process, outside the pool
            # A fresh session may find its predecessor still dying: the lock is shared with nobody else.
            self._connection.exec_driver_sql(f"select pg_advisory_lock_shared({self.owner})")

    def living(self, owners: Iterable[int]) -> set[int]:
        """Those of `owners` whose processes live."""
        owners = set(owners)
        if self._database.is_sqlite:
            return {owner for owner in owners if self._is_locked(self._path(owner))}
        held = self._database.read(lambda connection: connection.exec_driver_sql(LIVING).scalars().all())
        return owners & set(held)

    def release(self) -> None:
        if self._handle is not None:
            with suppress(FileNotFoundError):
                self._path(self.owner).unlink()
            os.close(self._handle)
            self._handle = None
        if self._connection is not None:
            with suppress(DBAPIError):
                self._connection.close()
            self._connection = None

    def _lock_file(self) -> int | None:
        """A descriptor of our locked file; None where another process took it for a dead one's meanwhile."""
        path = self._path(self.owner)
        for old in path.parent.glob(f"{self._database.path.name}.process-*"):  # type: ignore[union-attr]
            self._is_locked(old)  # and if not, it goes
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)
        return None

    def _path(self, owner: int) -> Path:
        return Path(f"{self._database.path}.process-{owner}")

    def _is_locked(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(handle)


LIVING = """
select (classid::bigint << 32) | objid::bigint from pg_locks
where locktype = 'advisory' and objsubid = 1 and granted
  and database = (select oid from pg_database where datname = current_database())
"""


def _sqlite_engine(url: URL, *, read_only: bool) -> Engine:
    pool = (
        {"pool_size": 5, "max_overflow": 10, "pool_timeout": READ_SECONDS}
        if read_only
        else {"poolclass": sa.NullPool}
    )
    engine = sa.create_engine(url, connect_args={"check_same_thread": False}, **pool)

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


def _postgresql_engine(url: URL, *, read_only: bool) -> Engine:
    if is_patched():
        psycopg2.extensions.set_wait_callback(_wait)
    options = [f"statement_timeout={STATEMENT_TIMEOUT_MS}", "timezone=UTC", "tcp_user_timeout=20000"]
    options += ["tcp_keepalives_idle=10", "tcp_keepalives_interval=5", "tcp_keepalives_count=3"]
    options += ["default_transaction_read_only=on"] if read_only else []
    engine = sa.create_engine(
        url,
        pool_size=5,
        max_overflow=10,
        pool_timeout=READ_SECONDS,
        connect_args={
            "connect_timeout": 2,
            "application_name": "perpetuo",
            "options": " ".join(f"-c {option}" for option in options),
        },
    )
    return engine.execution_options(isolation_level="AUTOCOMMIT") if read_only else engine


_clock = threading.local()  # greenlet-local under gevent


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    outer = getattr(_clock, "until", None)
    _clock.until = monotonic() + seconds
    try:
        yield
    finally:
        _clock.until = outer


def _is_late() -> bool:
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


@contextmanager
def _translated() -> Iterator[None]:
    """The one place where the database's exceptions become ours."""
    try:
        yield
    except PoolTimeout as exc:
        raise Unavailable("The database is busy; try again in a moment.") from exc
    except (OperationalError, InterfaceError, OSError) as exc:
        if _is_full(exc):
            message = "The database is out of space: the operator must free some before calls can be logged."
            raise Unavailable(message, code="storage_full", retry_after=30) from exc
        raise Unavailable("The database cannot be reached; try again in a moment.") from exc


def _is_full(exc: BaseException) -> bool:
    origin = getattr(exc, "orig", exc)
    return getattr(origin, "pgcode", None) == "53100" or "database or disk is full" in str(origin)


class _SharedSQLAlchemy(SQLAlchemy):
    """Flask-SQLAlchemy on our read pool: `db.session` reads, `Database.save` writes."""

    def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        return app.extensions["perpetuo"].database.reader


db = _SharedSQLAlchemy(model_class=Base)
