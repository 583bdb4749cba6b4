import psycopg2
import pytest

from perpetuo.db_errors import translated
from perpetuo.errors import Unavailable


@pytest.mark.parametrize("kind", [psycopg2.OperationalError, psycopg2.InterfaceError, ConnectionResetError])
def test_what_a_driver_raises_bare_is_the_database_away(kind: type[Exception]):
    with pytest.raises(Unavailable), translated():
        raise kind("the database is silent")


def test_a_bug_of_ours_stays_one():
    with pytest.raises(psycopg2.ProgrammingError), translated():
        raise psycopg2.ProgrammingError("syntax error")
