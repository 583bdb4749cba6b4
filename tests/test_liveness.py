import threading

import pytest

from perpetuo.errors import Unavailable
from perpetuo.liveness import ProcessLock
from tests.conftest import BACKENDS
from tests.serving import wait_until

OWNER = 12345
needs_postgresql = pytest.mark.skipif("postgresql" not in BACKENDS, reason="left out of this run")
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
WAITING = """
select pid from pg_stat_activity where datname = current_database() and wait_event = 'advisory'
"""


@pytest.fixture
def lock(gateway):
    lock = ProcessLock(gateway.database, OWNER)
    yield lock
    lock.release()


def test_a_lock_is_held_until_it_is_released(lock):
    lock.hold()
    lock.hold()
    assert lock.living([OWNER, OWNER + 1]) == {OWNER}
    lock.release()
    assert lock.living([OWNER]) == set()


@pytest.fixture
def other(gateway):
    """Another session."""
    with gateway.database.writer.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection


@on_postgresql
@needs_postgresql
def test_a_lock_whose_session_dies_while_it_waits_is_taken_the_next_time(lock, other):
    other.exec_driver_sql(f"select pg_advisory_lock({OWNER})")
    failures = []
    thread = threading.Thread(target=lambda: failures.append(pytest.raises(Unavailable, lock.hold)))
    thread.start()
    wait_until(lambda: other.exec_driver_sql(WAITING).all(), 10)
    other.exec_driver_sql(f"select pg_terminate_backend(pid) from ({WAITING}) as waiting")
    thread.join()
    other.exec_driver_sql(f"select pg_advisory_unlock({OWNER})")
    assert len(failures) == 1
    assert lock.living([OWNER]) == set()
    lock.hold()
    assert lock.living([OWNER]) == {OWNER}


@on_postgresql
@needs_postgresql
def test_a_lock_whose_session_died_is_taken_again(lock, other):
    lock.hold()
    other.exec_driver_sql(
        f"select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and objid = {OWNER}"
    )
    wait_until(lambda: not lock.living([OWNER]))
    lock.hold()
    assert lock.living([OWNER]) == {OWNER}
