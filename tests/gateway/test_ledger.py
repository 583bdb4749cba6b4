import threading

import pytest
import sqlalchemy as sa

from perpetuo.errors import InvalidRequest
from perpetuo.gateway import ledger as ledger_module
from perpetuo.gateway.access import Caller
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.sweep import Sweep
from perpetuo.models import RequestLog, UsageCounter

CALLER = Caller("ws_1", "key_1", "laptop", None, True, 1)
OPENING = {"endpoint": "chat.completions", "stream": False, "model": "gpt-4o", "provider": "openai"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "cached_tokens": 2}
USAGE |= {"usage_source": "provider"}
OK = {
    "status": "ok",
    "http_status": 200,
    "served_model": "gpt-4o",
    "latency_us": 1500,
    "ttft_us": 900,
    **USAGE,
}


@pytest.fixture
def ledger(gateway):
    books = Ledger(gateway.database)
    yield books
    books.close()


def rows(database):
    table = RequestLog.__table__
    return database.read(lambda c: c.execute(sa.select(table).order_by(table.c.id)).mappings().all())


def counters(database):
    return database.read(lambda c: c.execute(sa.select(UsageCounter.__table__)).mappings().all())


def die(ledger):
    """What kill -9 leaves: open rows, and a lock that nobody holds."""
    ledger.writer.close()
    ledger._lock.release()
    ledger._lock = None


def test_a_call_is_one_settled_row_and_its_counter(gateway, ledger):
    row = ledger.open(CALLER, OPENING)
    ledger.settle(row, dict(OK))
    (stored,) = rows(gateway.database)
    (counter,) = counters(gateway.database)
    assert (stored["status"], stored["total_tokens"], stored["owner"]) == ("ok", 12, ledger.owner)
    assert stored["finished_at"] >= stored["created_at"]
    assert (counter["requests"], counter["total_tokens"], counter["cached_tokens"]) == (1, 12, 2)
    assert (counter["model"], counter["provider"], counter["unpriced_requests"]) == ("gpt-4o", "openai", 1)
    assert counter["hour"] == stored["created_at"].replace(minute=0, second=0, microsecond=0)
    assert (counter["latency_01"], counter["ttft_00"]) == (1, 1)


def test_an_open_row_is_there_before_a_stream_begins(gateway, ledger):
    row = ledger.open(CALLER, OPENING)
    ledger.ensure_open(row)
    assert [r["status"] for r in rows(gateway.database)] == ["open"]
    assert counters(gateway.database) == []


def test_an_open_row_is_written_even_if_nobody_waits(gateway, ledger):
    ledger.open(CALLER, OPENING)
    while not rows(gateway.database):
        pass
    assert rows(gateway.database)[0]["status"] == "open"


def test_settling_an_open_row_counts_it_once(gateway, ledger):
    row = ledger.open(CALLER, OPENING)
    ledger.ensure_open(row)
    ledger.settle(row, dict(OK))
    ledger.writer.put(row)
    ledger.settle(ledger.open(CALLER, OPENING), dict(OK))
    assert [r["status"] for r in rows(gateway.database)] == ["ok", "ok"]
    assert [c["requests"] for c in counters(gateway.database)] == [2]


def test_many_threads_share_commits_and_lose_nothing(gateway, ledger):
    def call():
        for _ in range(10):
            ledger.settle(ledger.open(CALLER, OPENING), dict(OK))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows(gateway.database)) == 80
    assert sum(c["requests"] for c in counters(gateway.database)) == 80


def test_a_refusal_is_a_row_under_no_model(gateway, ledger):
    error = InvalidRequest("no", code="invalid_json")
    row_id = ledger.refuse(CALLER, error, OPENING)
    ledger.close()
    (stored,) = rows(gateway.database)
    (counter,) = counters(gateway.database)
    assert (stored["id"], stored["status"], stored["error_code"]) == (row_id, "refused", "invalid_json")
    assert (counter["refused"], counter["model"], counter["provider"], counter["cost_nano"]) == (1, "", "", 0)


def test_a_flood_of_refusals_shares_rows_but_counts_each(gateway, ledger, monkeypatch):
    monkeypatch.setattr(ledger_module.time, "time", lambda: 1_800_000_000.5)
    error = InvalidRequest("no", code="invalid_json")
    ids = [ledger.refuse(CALLER, error, OPENING) for _ in range(100)]
    ledger.close()
    stored = rows(gateway.database)
    assert len(stored) == 20 == len([row_id for row_id in ids if row_id])
    assert sum(row["count"] for row in stored) == 100
    assert [c["refused"] for c in counters(gateway.database)] == [100]


def test_the_rows_of_a_dead_process_are_settled_once(gateway, ledger):
    rows_left = [ledger.open(CALLER, OPENING) for _ in range(3)]
    for row in rows_left:
        ledger.ensure_open(row)
    living = Ledger(gateway.database)
    living.ensure_open(living.open(CALLER, OPENING))
    die(ledger)
    assert Sweep(living, 0).look() == 3
    assert Sweep(living, 0).look() == 0
    assert sorted(r["status"] for r in rows(gateway.database)) == ["interrupted"] * 3 + ["open"]
    assert [(c["requests"], c["errors"]) for c in counters(gateway.database)] == [(3, 3)]
    living.close()


def test_a_grace_keeps_orphans_until_the_second_look(gateway, ledger):
    ledger.ensure_open(ledger.open(CALLER, OPENING))
    die(ledger)
    living = Ledger(gateway.database)
    assert Sweep(living, 60).look() == 0
    assert rows(gateway.database)[0]["orphaned_at"] is not None
    assert Sweep(living, 0).look() == 1
    living.close()


def test_the_mark_goes_when_the_owner_lives_after_all(gateway, ledger):
    ledger.ensure_open(ledger.open(CALLER, OPENING))
    ledger._lock.release()
    other = Ledger(gateway.database)
    Sweep(other, 60).look()
    ledger.keep_lock()
    Sweep(other, 60).look()
    assert rows(gateway.database)[0]["orphaned_at"] is None
    other.close()


def test_a_late_settle_puts_a_swept_row_and_its_counters_right(gateway, ledger):
    row = ledger.open(CALLER, OPENING)
    ledger.ensure_open(row)
    ledger._lock.release()
    other = Ledger(gateway.database)
    assert Sweep(other, 0).look() == 1
    ledger.settle(row, {**OK, "served_model": "gpt-4o-2024"})
    (stored,) = rows(gateway.database)
    assert (stored["status"], stored["swept"], stored["error_code"]) == ("ok", False, None)
    sums = {c["model"]: (c["requests"], c["errors"], c["total_tokens"]) for c in counters(gateway.database)}
    assert sums == {"gpt-4o": (0, 0, 0), "gpt-4o-2024": (1, 0, 12)}
    other.close()


def test_a_row_the_database_refuses_is_stored_without_its_texts(gateway, ledger):
    row = ledger.open(CALLER, OPENING)
    ledger.settle(row, {**OK, "preview_answer": "\ud800", "request_body": b"j{}"})
    (stored,) = rows(gateway.database)
    assert (stored["status"], stored["preview_answer"], stored["request_body"]) == ("ok", None, None)
    assert counters(gateway.database)[0]["requests"] == 1


def test_a_poison_row_takes_no_other_with_it(gateway, ledger):
    poison, good = ledger.open(CALLER, OPENING), ledger.open(CALLER, OPENING)
    good.outcome = dict(OK)
    ledger.writer.put(good)
    ledger.settle(poison, {**OK, "status": "nonsense"})
    assert sorted(r["status"] for r in rows(gateway.database)) == ["error", "ok"]
