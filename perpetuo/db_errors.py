"""What goes wrong with a database, in our own errors: the one place where its exceptions become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from perpetuo.errors import Unavailable

UNDEFINED_TABLE = "42P01"  # PostgreSQL's SQLSTATE
# Classes of SQLSTATE that speak of the server, not of the statement: lost connections, a transaction that
# may not write (a standby), resources, an operator's stop, its disk, a lacking privilege, a bug of its own.
TROUBLE = ("08", "25", "53", "57", "58", "42501", "XX")
UNMIGRATED = "The database is not migrated: run `flask --app wsgi db upgrade`."


class CommitUncertain(Unavailable):
    """The connection was lost in COMMIT: the transaction may or may not be there."""


@contextmanager
def translated() -> Iterator[None]:
    """Raises Unavailable for what is the database's fault; what is the statement's comes as it is."""
    try:
        yield
    except PoolTimeout as exc:
        raise Unavailable("The database is busy; try again in a moment.") from exc
    except DBAPIError as exc:
        state = str(getattr(exc.orig, "pgcode", None) or "")
        if state == UNDEFINED_TABLE or "no such table" in str(exc.orig):
            raise Unavailable(UNMIGRATED) from exc
        if not isinstance(exc, OperationalError | InterfaceError) and not state.startswith(TROUBLE):
            raise
        raise _unavailable(exc) from exc
    except (OSError, psycopg2.OperationalError, psycopg2.InterfaceError) as exc:
        # The driver's own come bare where SQLAlchemy only takes a connection back.
        raise _unavailable(exc) from exc


def _unavailable(exc: BaseException) -> Unavailable:
    if _is_full(exc):
        message = "The database is out of space: the operator must free some before calls can be logged."
        return Unavailable(message, code="storage_full", retry_after=30)
    return Unavailable("The database cannot be reached; try again in a moment.")


def _is_full(exc: BaseException) -> bool:
    origin = getattr(exc, "orig", exc)
    return getattr(origin, "pgcode", None) == "53100" or "database or disk is full" in str(origin)
