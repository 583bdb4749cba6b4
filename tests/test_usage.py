from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask

from perpetuo.gateway.walk import Gateway
from perpetuo.models import BUCKET_RATIO
from perpetuo.usage import percentiles, window
from tests.books import add_counter
from tests.people import Person

SHAPE = (
    "requests errors refused client_closed prompt_tokens completion_tokens cached_tokens total_tokens "
    "cost_usd unpriced_requests cache_hits latency_ms ttft_ms"
)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MARCH = "from=2026-03-01&to=2026-04-01"


def usage(person: Person, query: str) -> dict:
    response = person.get(f"usage?{query}")
    assert response.status_code == 200, response.text
    return response.get_json()


def test_nothing_used_is_zero_and_has_no_percentiles(app: Flask):
    body = usage(Person(app), "")
    assert list(body) == ["from", "to", "totals", "data"]
    assert " ".join(body["totals"]) == SHAPE
    assert (body["data"], body["totals"]["cost_usd"]) == ([], 0)
    assert body["totals"]["latency_ms"] == {"p50": None, "p95": None, "p99": None}


def test_the_default_window_is_thirty_days_to_the_end_of_this_hour():
    now = datetime(2026, 3, 31, 12, 30, tzinfo=UTC)
    assert window(None, None, now) == (
        datetime(2026, 3, 1, 13, tzinfo=UTC),
        datetime(2026, 3, 31, 13, tzinfo=UTC),
    )


def test_a_window_is_rounded_outwards_and_echoed(app: Flask):
    body = usage(Person(app), "from=2026-03-01T12:59:59Z&to=2026-03-01T13:00:01Z")
    assert (body["from"], body["to"]) == ("2026-03-01T12:00:00.000000Z", "2026-03-01T14:00:00.000000Z")
    whole = usage(Person(app), "from=2026-03-01T12:00:00Z&to=2026-03-01T13:00:00Z")
    assert whole["to"] == "2026-03-01T13:00:00.000000Z"


def test_the_window_is_half_open(app: Flask, gateway: Gateway):
    person = Person(app)
    for hours in (-1, 0, 1, 2):
        add_counter(gateway, person.workspace, hour=NOON + timedelta(hours=hours))
    body = usage(person, "from=2026-03-01T12:00:00Z&to=2026-03-01T14:00:00Z&group_by=hour")
    assert [row["hour"] for row in body["data"]] == [
        "2026-03-01T12:00:00.000000Z",
        "2026-03-01T13:00:00.000000Z",
    ]
    assert body["totals"]["requests"] == 2


@pytest.mark.parametrize(
    ("group", "labels"),
    [
        (
            "hour",
            ["2026-03-01T00:00:00.000000Z", "2026-03-01T23:00:00.000000Z", "2026-03-31T23:00:00.000000Z"],
        ),
        ("day", ["2026-03-01", "2026-03-31"]),
        ("month", ["2026-03"]),
        ("provider", ["openai"]),
    ],
)
def test_groups_are_ascending_and_sum_up(app: Flask, gateway: Gateway, group: str, labels: list[str]):
    person = Person(app)
    for day, hour in ((31, 23), (1, 23), (1, 0)):
        add_counter(gateway, person.workspace, hour=datetime(2026, 3, day, hour, tzinfo=UTC), prompt_tokens=5)
    body = usage(person, f"{MARCH}&group_by={group}")
    assert [row[group] for row in body["data"]] == labels
    assert sum(row["prompt_tokens"] for row in body["data"]) == body["totals"]["prompt_tokens"] == 15


def test_groups_combine_in_the_order_asked(app: Flask, gateway: Gateway):
    person = Person(app)
    for model in ("b", "a", ""):
        add_counter(gateway, person.workspace, hour=NOON, model=model, provider="openai" if model else "")
    rows = usage(person, f"{MARCH}&group_by=model,provider,day,model")["data"]
    assert list(rows[0])[:4] == ["model", "provider", "day", "requests"]
    assert [(row["model"], row["provider"]) for row in rows] == [
        (None, None),
        ("a", "openai"),
        ("b", "openai"),
    ]


def test_days_are_the_default(app: Flask, gateway: Gateway):
    person = Person(app)
    add_counter(gateway, person.workspace, hour=NOON)
    assert usage(person, MARCH)["data"] == usage(person, f"{MARCH}&group_by=day")["data"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=week", "group_by"),
        ("group_by=day,colour", "group_by"),
        ("from=x", "from"),
        ("to=9999-12-31T23:59:59Z", "to"),
        ("to=0001-01-01", "to"),
        ("from=2026-03-02&to=2026-03-01", "from"),
    ],
)
def test_a_bad_question_is_refused(app: Flask, query: str, param: str):
    response = Person(app).get(f"usage?{query}")
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, param)


def test_cost_is_the_known_cost_and_null_only_where_there_is_none(app: Flask, gateway: Gateway):
    person = Person(app)
    add_counter(gateway, person.workspace, hour=NOON, model="a", requests=2, unpriced_requests=2)
    add_counter(gateway, person.workspace, hour=NOON, model="b", requests=2, unpriced_requests=1, cost_nano=1)
    response = person.get(f"usage?{MARCH}&group_by=model")
    unpriced, mixed = response.get_json()["data"]
    assert (unpriced["cost_usd"], mixed["cost_usd"]) == (None, 1e-9)
    assert response.text.count('"cost_usd":0.000000001,') == 2
    assert response.get_json()["totals"]["unpriced_requests"] == 3


@pytest.mark.parametrize("costless", ["refused", "errors", "client_closed"])
def test_what_costs_nothing_does_not_make_the_unpriced_free(app: Flask, gateway: Gateway, costless: str):
    person = Person(app)
    add_counter(gateway, person.workspace, hour=NOON, model="", **{costless: 1})
    assert usage(person, MARCH)["totals"]["cost_usd"] == 0
    add_counter(gateway, person.workspace, hour=NOON, model="a", requests=2, unpriced_requests=2)
    assert usage(person, MARCH)["totals"]["cost_usd"] is None
    add_counter(gateway, person.workspace, hour=NOON, model="free")
    assert usage(person, MARCH)["totals"]["cost_usd"] == 0


def test_every_count_is_passed_on(app: Flask, gateway: Gateway):
    person = Person(app)
    counts = {"requests": 10, "errors": 1, "refused": 2, "client_closed": 3, "completion_tokens": 4}
    add_counter(gateway, person.workspace, hour=NOON, **counts, cached_tokens=5, total_tokens=6)
    totals = usage(person, MARCH)["totals"]
    assert {name: totals[name] for name in counts} == counts
    assert (totals["cached_tokens"], totals["total_tokens"], totals["cache_hits"]) == (5, 6, 0)


@pytest.mark.parametrize("value", [1.1, 7, 100, 1234, 60_000, 250_000])
def test_percentiles_are_at_most_a_quarter_off(value: float):
    buckets = [0] * 32
    buckets[next(i for i in range(32) if value <= BUCKET_RATIO**i)] = 1000
    assert percentiles(buckets) == dict.fromkeys(("p50", "p95", "p99"), pytest.approx(value, rel=0.25))


def test_percentiles_are_those_of_the_whole(app: Flask, gateway: Gateway):
    person = Person(app)
    add_counter(gateway, person.workspace, hour=NOON, model="a", latency_10=94, ttft_03=1)
    add_counter(gateway, person.workspace, hour=NOON, model="b", latency_20=6)
    totals = usage(person, MARCH)["totals"]
    middles = [round(BUCKET_RATIO ** (bucket - 0.5), 3) for bucket in (10, 20, 20)]
    assert list(totals["latency_ms"].values()) == middles
    assert totals["ttft_ms"]["p50"] == totals["ttft_ms"]["p99"] == 2.756


def test_another_workspaces_usage_is_not_in_it(app: Flask, gateway: Gateway):
    person, other = Person(app), Person(app)
    add_counter(gateway, other.workspace, hour=NOON)
    assert usage(person, MARCH)["totals"]["requests"] == 0
