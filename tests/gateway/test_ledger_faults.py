import threading
import time

import pytest

from perpetuo import create_app
from perpetuo.config import load
from perpetuo.errors import Unavailable
from perpetuo.gateway import ledger as ledger_module
from perpetuo.gateway.audit import differences
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.sweep import Sweep
from tests import postgres
from tests.conftest import migrate
from tests.fault_proxy import FaultProxy
from tests.gateway.test_ledger import CALLER, OK, OPENING, counters, rows


@pytest.fixture(scope="module")
def server():
    running = postgres.start(tcp=True, durable=True)
    yield running
    running.stop()


@pytest.fixture
def proxy(server):
    with FaultProxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def direct(server, tmp_path, request):
    """The database past the proxy: what is really there."""
    url = server.create_database(f"faults_{abs(hash(request.node.nodeid)) % 10**9}")
    migrate(url, tmp_path)
    gateway = create_app(load({"DATABASE_URL": url, "PERPETUO_DATA": str(tmp_path)})).extensions["perpetuo"]
    yield gateway.database
    gateway.close()


@pytest.fixture
def ledger(server, direct, proxy, tmp_path):
    url = server.tcp_url(direct.url.database, proxy.address)
    gateway = create_app(load({"DATABASE_URL": url, "PERPETUO_DATA": str(tmp_path)})).extensions["perpetuo"]
    books = Ledger(gateway.database)
    books.settle(books.open(CALLER, OPENING), dict(OK))  # warm: connected, locked
    yield books
    proxy.refuse = proxy.silent = False
    books.close()
    gateway.close()


@pytest.mark.parametrize("before", [True, False])
def test_a_settle_cut_at_commit_is_there_once(direct, ledger, proxy, before):
    row = ledger.open(CALLER, OPENING)
    proxy.cut_at_commit(before=before)
    ledger.settle(row, dict(OK))
    proxy.wait_for_cuts(1)
    assert [r["status"] for r in rows(direct)] == ["ok", "ok"]
    assert [c["requests"] for c in counters(direct)] == [2]
    assert differences(direct) == []


@pytest.mark.parametrize("before", [True, False])
def test_an_open_cut_at_commit_is_settled_once(direct, ledger, proxy, before):
    row = ledger.open(CALLER, OPENING)
    proxy.cut_at_commit(before=before)
    ledger.ensure_open(row)
    proxy.cut_at_commit(before=before, times=2)
    ledger.settle(row, dict(OK))
    proxy.wait_for_cuts(3)
    assert [r["status"] for r in rows(direct)] == ["ok", "ok"]
    assert [c["requests"] for c in counters(direct)] == [2]


@pytest.mark.parametrize("before", [True, False])
def test_a_sweep_cut_at_commit_counts_once(direct, ledger, proxy, before):
    ledger.ensure_open(ledger.open(CALLER, OPENING))
    ledger.writer.close()
    ledger._lock.release()
    ledger._lock = None
    proxy.cut_at_commit(before=before)
    sweep = Sweep(ledger, 0)
    for _ in range(4):
        try:
            sweep.look()
        except Unavailable:
            continue
    assert [r["status"] for r in rows(direct)] == ["ok", "interrupted"]
    assert sum(c["requests"] for c in counters(direct)) == 2
    assert differences(direct) == []


def test_nothing_is_admitted_while_the_database_is_away(direct, ledger, proxy):
    proxy.refuse = True
    proxy.cut()
    late = ledger.open(CALLER, OPENING)
    settling = threading.Thread(target=ledger.settle, args=(late, dict(OK)))
    settling.start()
    while ledger.writer.failure is None:
        pass
    began = time.monotonic()
    with pytest.raises(Unavailable):
        ledger.open(CALLER, OPENING)
    assert time.monotonic() - began < 2 * ledger_module.ADMISSION_SECONDS
    proxy.refuse = False
    settling.join()
    ledger.settle(ledger.open(CALLER, OPENING), dict(OK))
    assert [r["status"] for r in rows(direct)] == ["ok"] * 3
    assert differences(direct) == []


def test_a_settle_outlasts_a_restart_of_postgresql(server, direct, ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "SETTLE_SECONDS", 60)
    row = ledger.open(CALLER, OPENING)
    ledger.ensure_open(row)
    server.kill()
    settling = threading.Thread(target=ledger.settle, args=(row, dict(OK)))
    settling.start()
    server.start_again()
    settling.join()
    assert row.is_settled
    assert [r["status"] for r in rows(direct)] == ["ok", "ok"]


def test_a_stream_that_cannot_be_settled_still_ends(direct, ledger, proxy, monkeypatch):
    monkeypatch.setattr(ledger_module, "SETTLE_SECONDS", 0.2)
    row = ledger.open(CALLER, OPENING)
    ledger.ensure_open(row)
    proxy.refuse = True
    proxy.cut()
    ledger.settle(row, dict(OK))  # its open row is committed: the sweep would settle it
    lost = ledger.writer.failure
    proxy.refuse = False
    while not row.is_settled:
        pass
    assert lost is not None
    assert differences(direct) == []


def test_an_answer_without_any_row_is_refused(ledger, proxy, monkeypatch):
    monkeypatch.setattr(ledger_module, "SETTLE_SECONDS", 0.2)
    row = ledger.open(CALLER, OPENING)
    proxy.refuse = True
    proxy.cut()
    with pytest.raises(Unavailable):
        ledger.settle(row, dict(OK))


def test_the_lock_is_taken_again_after_its_session_was_cut(direct, ledger, proxy):
    ledger.ensure_open(ledger.open(CALLER, OPENING))
    proxy.cut()
    other = Ledger(direct)
    while other.living({ledger.owner}):
        pass
    ledger.keep_lock()
    assert other.living({ledger.owner}) == {ledger.owner}
    other.close()
