"""Which processes live: each holds a lock that its death releases, whatever kills it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from perpetuo.db import READ_SECONDS, Database
from perpetuo.db_errors import translated
from perpetuo.engines import deadline


class ProcessLock:
    """The lock of one process, named by its random number.

    PostgreSQL: a session's advisory lock on a connection of its own. SQLite: a locked file beside the
    database. Both are read without being taken.
    """

    def __init__(self, database: Database, owner: int) -> None:
        self.owner = owner
        self._database = database
        self._connection: Connection | None = None
        self._handle: int | None = None

    def hold(self) -> None:
        """Takes the lock, or takes it again after a lost connection. Raises Unavailable."""
        if self._database.is_sqlite:
            while self._handle is None:
                self._handle = self._lock_file()
            return
        with deadline(READ_SECONDS), translated():
            try:
                if self._connection is not None:
                    self._connection.exec_driver_sql("select 1")
                    return
            except SQLAlchemyError:
                self.release()
            connection = self._database.writer.execution_options(isolation_level="AUTOCOMMIT").connect()
            connection.detach()  # lives and dies with this process, outside the pool
            try:
                # A fresh session may find its predecessor still dying: the lock is shared with nobody else.
                connection.exec_driver_sql(f"select pg_advisory_lock_shared({self.owner})")
            except BaseException:  # not ours before the lock is: whoever asks next begins anew
                _close(connection)
                raise
            self._connection = connection

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
            _close(self._connection)
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


def _close(connection: Connection) -> None:
    with suppress(SQLAlchemyError):
        connection.close()


LIVING = """
select (classid::bigint << 32) | objid::bigint from pg_locks
where locktype = 'advisory' and objsubid = 1 and granted
  and database = (select oid from pg_database where datname = current_database())
"""
