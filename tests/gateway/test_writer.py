import threading

import pytest

from perpetuo.db_errors import CommitUncertain
from perpetuo.errors import Unavailable
from perpetuo.gateway import writer as writer_module
from perpetuo.gateway.rows import Row
from perpetuo.gateway.writer import Writer

OK = {"status": "ok"}


class Books:
    """What a commit does, for a test: it records batches, fails as often as told, or waits at a gate."""

    def __init__(self):
        self.batches = []
        self.failures = []
        self.values = {}
        self.gate = threading.Event()
        self.gate.set()
        self.is_inside = threading.Event()

    def commit(self, snapshots):
        self.is_inside.set()
        assert self.gate.wait(10)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self.values |= {snapshot.row.id: snapshot.values for snapshot in snapshots}
        self.batches.append([(snapshot.row.id, snapshot.is_final) for snapshot in snapshots])

    @property
    def ids(self):
        return [[row_id for row_id, _ in batch] for batch in self.batches]


@pytest.fixture
def books(monkeypatch):
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", (0.001,))
    return Books()


@pytest.fixture
def writer(books):
    writer = Writer(books.commit, lambda: None)
    writer.start()
    yield writer
    books.gate.set()
    writer.close()


def row(row_id, outcome=None):
    return Row({"id": row_id, "count": 1}, outcome)


def put_and_wait(writer, *rows):
    events = [row.expect() for row in rows]
    for row_ in rows:
        writer.put(row_)
    assert all(event.wait(10) for event in events)


def test_a_lone_row_waits_for_no_company(writer, books):
    alone = row("a", OK)
    put_and_wait(writer, alone)
    assert books.batches == [[("a", True)]]
    assert alone.is_settled


def test_what_comes_during_a_commit_shares_the_next(writer, books):
    books.gate.clear()
    first, others = row("a", OK), [row(name, OK) for name in "bcd"]
    writer.put(first)
    assert books.is_inside.wait(10)
    events = [other.expect() for other in others]
    for other in others:
        writer.put(other)
    books.gate.set()
    assert all(event.wait(10) for event in events)
    assert books.ids == [["a"], ["b", "c", "d"]]


def test_nobody_is_told_before_the_commit(writer, books):
    books.gate.clear()
    waiting = row("a", OK)
    event = waiting.expect()
    writer.put(waiting)
    assert books.is_inside.wait(10)
    assert not event.is_set()
    assert not waiting.is_settled
    books.gate.set()
    assert event.wait(10)


def test_a_row_put_twice_is_written_once(writer, books):
    twice = row("a")
    writer.put_lazily(twice, 60)
    twice.outcome = dict(OK)
    put_and_wait(writer, twice)
    writer.close()
    assert books.batches == [[("a", True)]]


def test_a_lazy_row_is_written_though_nobody_waits(writer, books):
    lazy = row("a")
    event = lazy.expect()
    writer.put_lazily(lazy)
    assert event.wait(10)
    assert books.batches == [[("a", False)]]
    assert lazy.is_open


def test_a_lazy_row_is_not_written_before_its_time(writer, books):
    writer.put_lazily(row("lazy"), 60)
    put_and_wait(writer, row("urgent", OK))
    assert books.ids == [["urgent"]]
    writer.close()
    assert books.ids == [["urgent"], ["lazy"]]


def test_a_row_that_changes_during_its_commit_is_written_again(writer, books):
    books.gate.clear()
    changing = row("a")
    writer.put(changing)
    assert books.is_inside.wait(10)
    changing.outcome = dict(OK)
    books.gate.set()
    put_and_wait(writer, changing)
    assert changing.is_settled
    assert books.batches == [[("a", False)], [("a", True)]]


def test_a_large_crowd_goes_in_several_transactions(writer, books, monkeypatch):
    monkeypatch.setattr(writer_module, "BATCH", 3)
    rows = [row(f"{number}", OK) for number in range(10)]
    put_and_wait(writer, *rows)
    assert sum(books.ids, []) == [row_.id for row_ in rows]
    assert max(map(len, books.ids)) == 3


def test_while_the_database_is_away_the_batch_is_tried_until_it_is_back(writer, books):
    books.failures = [Unavailable("away") for _ in range(20)]
    waiting = row("a", OK)
    put_and_wait(writer, waiting)
    assert waiting.is_settled
    assert books.ids == [["a"]]
    assert writer.failure is None


def test_others_see_that_the_last_commit_failed(writer, books):
    books.failures = [Unavailable("full", code="storage_full")] * 3
    seen = []
    commit = writer._commit
    writer._commit = lambda snapshots: (seen.append(writer.failure), commit(snapshots))
    put_and_wait(writer, row("a", OK))
    assert [failure and failure.code for failure in seen] == [
        None,
        "storage_full",
        "storage_full",
        "storage_full",
    ]


@pytest.mark.parametrize("failure", [Unavailable("away"), CommitUncertain("lost in commit")])
def test_after_a_lost_commit_the_row_may_be_there(writer, books, failure):
    books.failures = [failure]
    seen = []
    commit = writer._commit
    writer._commit = lambda snapshots: (seen.append(snapshots[0].may_exist), commit(snapshots))
    put_and_wait(writer, row("a", OK))
    assert seen == [False, True]


def test_a_batch_that_fails_for_another_reason_is_written_row_by_row(writer, books):
    books.gate.clear()
    writer.put(row("first", OK))
    assert books.is_inside.wait(10)
    rows = [row(name, OK) for name in "abc"]
    events = [row_.expect() for row_ in rows]
    for row_ in rows:
        writer.put(row_)
    books.failures = [None, ValueError("poison")]
    books.failures = books.failures[1:]
    books.gate.set()
    assert all(event.wait(10) for event in events)
    assert sorted(sum(books.ids, [])) == ["a", "b", "c", "first"]


def test_a_row_that_fails_even_without_its_texts_has_failed(writer, books):
    books.failures = [ValueError("poison")] * 4
    poison = row("a", {**OK, "error_message": "x"})
    put_and_wait(writer, poison)
    assert poison.failure.code == "unavailable"
    assert not poison.is_settled
    put_and_wait(writer, row("b", OK))
    assert books.ids == [["b"]]


def test_a_settle_that_is_refused_ends_at_least_as_an_error(writer, books):
    books.failures = [ValueError("poison")] * 3
    poison = row("a", {**OK, "error_message": "x"})
    put_and_wait(writer, poison)
    assert poison.is_settled
    assert books.values["a"]["status"] == "error"


def test_a_database_away_loses_no_row_that_is_written_alone(writer, books):
    books.failures = [ValueError("poison"), Unavailable("away"), Unavailable("away")]
    rows = [row("a", OK), row("b", OK)]
    put_and_wait(writer, *rows)
    assert all(written.is_settled for written in rows)
    assert writer.failure is None


def test_a_batch_is_bounded_in_bytes(writer, books, monkeypatch):
    monkeypatch.setattr(writer_module, "BATCH_BYTES", 1000)
    books.gate.clear()
    put = [row("first", OK)]
    writer.put(put[0])
    assert books.is_inside.wait(10)
    put += [row(name, {**OK, "request_body": b"x" * 600}) for name in "abcd"]
    waiting = [written.expect() for written in put[1:]]
    for written in put[1:]:
        writer.put(written)
    books.gate.set()
    assert all(event.wait(10) for event in waiting)
    assert books.ids == [["first"], ["a", "b"], ["c", "d"]]


def test_a_batch_too_large_for_its_time_is_halved(writer, books):
    books.gate.clear()
    put = [row(name, OK) for name in "xabcd"]
    for written in put:
        writer.put(written)
        assert books.is_inside.wait(10)
    books.failures = [None, Unavailable("too slow"), Unavailable("too slow")]
    waiting = [written.expect() for written in put]
    books.gate.set()
    assert all(event.wait(10) for event in waiting)
    assert sorted(sum(books.ids, [])) == ["a", "b", "c", "d", "x"]
    assert books.ids[:2] == [["x"], ["a"]]


def test_a_row_is_withdrawn_only_before_its_first_commit(writer, books):
    books.gate.clear()
    taken, waits = row("a", OK), row("b")
    writer.put(taken)
    assert books.is_inside.wait(10)
    writer.put(waits)
    assert not writer.withdraw(taken)
    assert writer.withdraw(waits)
    books.gate.set()
    put_and_wait(writer, row("c", OK))
    assert books.ids == [["a"], ["c"]]


def test_a_settled_row_lets_go_of_what_it_held(writer):
    settled = row("a", {**OK, "request_body": b"x" * 1000})
    put_and_wait(writer, settled)
    assert (settled.opening, settled.outcome) == ({"id": "a"}, {})


def test_counting_into_a_row_ends_when_it_is_on_its_way(writer):
    shared = row("a", OK)
    writer.put_lazily(shared, 60)
    assert writer.count(shared)
    assert shared.opening["count"] == 2
    put_and_wait(writer, shared)
    assert not writer.count(shared)


def test_closing_commits_what_waits(writer, books):
    for name in "abc":
        writer.put_lazily(row(name, OK), 60)
    writer.close()
    assert books.ids == [["a", "b", "c"]]


def test_closing_with_the_database_away_does_not_wait_for_ever(writer, books):
    books.failures = [Unavailable("away")] * 1000
    writer.put_lazily(row("a", OK), 60)
    writer.close()
    assert books.ids == []


def test_what_runs_behind_a_commit_keeps_nobody_waiting(books):
    served = threading.Event()
    writer = Writer(books.commit, lambda: served.wait(10))
    writer.start()
    put_and_wait(writer, row("a", OK))
    served.set()
    writer.close()
