import json
from contextlib import nullcontext

import pytest

from bench import __main__ as bench
from bench import load, peers, report, upstream
from bench.ground import Ground
from tests.fake_upstream import FakeUpstream

SMALL = ["--rounds=1", "--seconds=1", "--starts=1", "--requests=10", "--streams=4", "--chunks=20"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the benchmark with what it brings along; gives what it prints and what it writes."""

    def run(*arguments):
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(load, "WRK", None)
        monkeypatch.setattr(peers, "NGINX", None)
        bench.main([*SMALL, "--backends=sqlite", "--connections=2", *arguments])
        [written] = tmp_path.iterdir()
        return capsys.readouterr().out, json.loads(written.read_text())

    return run


def test_every_part_measures_without_a_failed_call(run):
    printed, written = run()
    assert [note for note in written["notes"] if "measured" in note or "streams" in note] == []
    rows = written["rows"]
    assert set(rows) == {"plain", "streams", "start", "memory"}
    assert {row["peer"] for row in rows["plain"]} == {"direct", "gateway sqlite"}
    assert all(row["failed"] == 0 for part in rows.values() for row in part)
    assert all(row["complete"] == 4 for row in rows["streams"])
    assert all(title in printed for title in report.TITLES.values())
    assert "bundled (nginx is missing)" in printed


def test_a_part_that_breaks_is_noted_and_the_others_go_on(run, monkeypatch, tmp_path):
    def broken(*_):
        raise OSError("no such thing")
        yield

    def whole(*_):
        yield {"peer": "gateway sqlite", "load": 2, "round": 0, "start s": 0.5, "failed": 0}

    monkeypatch.setattr(bench, "prepared", lambda *_, **__: nullcontext(Ground(tmp_path, 0, {})))
    monkeypatch.setattr(bench, "PARTS", {"plain": broken, "start": whole})
    printed, written = run()
    assert "NOTE: plain was not measured to its end: no such thing" in printed
    assert set(written["rows"]) == {"start"}


def test_an_unknown_part_is_refused():
    with pytest.raises(SystemExit):
        bench.parse(["--only=plain,speed"])


def test_a_ratio_is_taken_within_a_round_and_against_the_same_database():
    rows = [
        {"peer": "base sqlite", "load": 64, "round": 0, "req/s": 100.0, "failed": 0},
        {"peer": "base sqlite", "load": 64, "round": 1, "req/s": 1000.0, "failed": 0},
        {"peer": "base postgresql", "load": 64, "round": 0, "req/s": 7.0, "failed": 0},
        {"peer": "gateway sqlite", "load": 64, "round": 1, "req/s": 2000.0, "failed": 0},
        {"peer": "gateway sqlite", "load": 64, "round": 0, "req/s": 300.0, "failed": 2},
    ]
    header, *lines = [line.split() for line in list(report.table("plain", rows))[1:]]
    assert header == ["req/s", "req/base", "spread", "failed"]
    assert lines[-1] == ["64", "gateway", "sqlite", "1,150", "2.50", "148%", "2"]


def test_a_failed_call_is_counted_by_the_bundled_load(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "WRK", None)
    with FakeUpstream() as fake:
        url = f"http://127.0.0.1:{fake.port}/v1/nowhere"
        calls = load.drive(url, {}, b"{}", 2, 1, tmp_path)
    assert (calls.requests, calls.failed) == (0, 2)


def test_the_completion_has_the_size_that_the_figures_are_quoted_for():
    assert len(upstream.WHOLE) == upstream.COMPLETION_BYTES
    assert json.loads(upstream.WHOLE)["choices"][0]["message"]["content"]
