import base64
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from flask import Flask

from perpetuo import workspaces
from perpetuo.db import Database
from perpetuo.gateway.walk import Gateway
from perpetuo.models import ApiKey, ProviderKey, RequestLog, UsageCounter, Workspace
from perpetuo.periods import period_end, period_start
from tests.books import add_counter, add_log
from tests.people import Person

SHAPE = (
    "id name created_at log_bodies retention_days pruned_before monthly_budget_usd spent_usd "
    "held_usd resets_at routes"
)


INJECTED = base64.urlsafe_b64encode(b'["is null or 1 <", "2026-01-01T00:00:00Z", "x"]').decode().rstrip("=")


def version(database: Database, workspace_id: str) -> int:
    query = sa.select(Workspace.config_version).where(Workspace.id == workspace_id)
    return database.read(lambda connection: connection.execute(query).scalar_one())


def test_a_new_workspace_has_the_shape_and_the_defaults(app: Flask):
    response = Person(app).post("/workspaces", {"name": "  Team  "})
    body = response.get_json()
    assert response.status_code == 201
    assert " ".join(body) == SHAPE
    assert body["created_at"].endswith("Z")
    assert (body["name"], body["log_bodies"], body["routes"], body["spent_usd"]) == ("Team", True, {}, 0)


def test_workspaces_are_listed_newest_first_a_page_at_a_time(app: Flask):
    person = Person(app)
    names = ["Default", *(person.post("/workspaces", {"name": f"w{n}"}).get_json()["name"] for n in range(4))]
    first = person.get("/workspaces?limit=2").get_json()
    second = person.get(f"/workspaces?limit=2&cursor={first['next_cursor']}").get_json()
    third = person.get(f"/workspaces?limit=2&cursor={second['next_cursor']}").get_json()
    seen = [one["name"] for page in (first, second, third) for one in page["data"]]
    assert seen == names[::-1]
    assert (first["prev_cursor"], third["next_cursor"]) == (None, None)
    back = person.get(f"/workspaces?limit=2&cursor={third['prev_cursor']}").get_json()
    assert back["data"] == second["data"]
    start = person.get(f"/workspaces?limit=2&cursor={back['prev_cursor']}").get_json()
    assert (start["data"], start["prev_cursor"]) == (first["data"], None)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("limit=-1", "limit"),
        ("limit=1.5", "limit"),
    ]
    + [
        (f"cursor={text}", "cursor")
        for text in ("x", "%00", "W10", "WyI8IiwgIngiLCAieCJd", "%F0%9F%98%80", INJECTED, "1" * 9999)
    ],
)
def test_a_bad_cursor_or_limit_is_refused(app: Flask, query: str, param: str):
    response = Person(app).get(f"/workspaces?{query}")
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param


def test_unknown_query_parameters_are_ignored(app: Flask):
    assert Person(app).get("/workspaces?colour=red").status_code == 200


def test_a_patch_changes_what_was_sent_and_nothing_else(app: Flask):
    person = Person(app)
    person.patch("", {"retention_days": 30, "monthly_budget_usd": 12.5, "log_bodies": False})
    body = person.patch(
        "", {"retention_days": None, "routes": {"smart": [{"model": "openai/gpt-5"}]}}
    ).get_json()
    assert (body["retention_days"], body["monthly_budget_usd"], body["log_bodies"]) == (None, 12.5, False)
    assert body["routes"] == {"smart": [{"model": "openai/gpt-5"}]}
    assert person.patch("", {"routes": None}).get_json()["routes"] == {}


@pytest.mark.parametrize(
    "field", ["id", "user_id", "spent_usd", "held_nano", "config_version", "pruned_before"]
)
def test_only_the_listed_fields_can_be_written(app: Flask, field: str):
    response = Person(app).patch("", {field: 1})
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, field)


def test_one_nano_dollar_is_printed_as_a_decimal(app: Flask):
    response = Person(app).patch("", {"monthly_budget_usd": 0.000000001})
    assert '"monthly_budget_usd":0.000000001,' in response.text


def test_every_write_moves_the_config_version(app: Flask, gateway: Gateway):
    person = Person(app)
    key, api_key = person.provider_key(), person.api_key()
    writes = [
        lambda: person.patch("", {"name": "x"}),
        lambda: person.provider_key(),
        lambda: person.patch(f"providers/{key['id']}", {"weight": 2}),
        lambda: person.delete(f"providers/{key['id']}"),
        lambda: person.api_key(),
        lambda: person.patch(f"api-keys/{api_key['id']}", {"name": "x"}),
        lambda: person.delete(f"api-keys/{api_key['id']}"),
    ]
    for write in writes:
        before = version(gateway.database, person.workspace)
        write()
        assert version(gateway.database, person.workspace) == before + 1


def test_reading_changes_nothing(app: Flask, gateway: Gateway):
    person = Person(app)
    before = version(gateway.database, person.workspace)
    for path in ("", "providers", "api-keys", "logs", "usage", "/workspaces", "/auth/me"):
        assert person.get(path).status_code == 200
    assert version(gateway.database, person.workspace) == before


def test_deleting_takes_everything_with_it_and_nothing_else(app: Flask, gateway: Gateway, monkeypatch):
    monkeypatch.setattr(workspaces, "BATCH", 2)
    person, other = Person(app), Person(app)
    for one in (person, other):
        one.provider_key(), one.api_key()
        for _ in range(5):
            add_log(gateway, one.workspace)
        add_counter(gateway, one.workspace)
    assert person.delete("").status_code == 204
    assert person.get("").status_code == 404
    for model in (Workspace, ProviderKey, ApiKey, RequestLog, UsageCounter):
        column = sa.inspect(model).c["id" if model is Workspace else "workspace_id"]
        query = sa.select(column).distinct()
        left = gateway.database.read(
            lambda connection, query=query: connection.execute(query).scalars().all()
        )
        assert left == [other.workspace]


def test_spending_is_this_months_known_cost(app: Flask, gateway: Gateway):
    person = Person(app)
    this_month = period_start("month", datetime.now(UTC))
    add_counter(gateway, person.workspace, hour=this_month - timedelta(hours=1), cost_nano=5)
    assert person.get("").get_json()["spent_usd"] == 0
    add_counter(gateway, person.workspace, hour=this_month, model="a", unpriced_requests=1)
    assert person.get("").get_json()["spent_usd"] is None
    add_counter(gateway, person.workspace, hour=this_month, model="b", cost_nano=12_345)
    assert '"spent_usd":0.000012345,' in person.get("").text
    assert '"spent_usd":0.000012345,' in person.get("/workspaces").text


def test_periods_are_calendar_periods_of_utc():
    moment = datetime(2026, 12, 31, 23, 59, tzinfo=UTC)
    assert [period_start(p, moment).isoformat()[:10] for p in ("day", "week", "month", "total")] == [
        "2026-12-31",
        "2026-12-28",
        "2026-12-01",
        "1970-01-01",
    ]
    ends = [period_end(p, moment) for p in ("day", "week", "month", "total")]
    assert [end and end.isoformat()[:10] for end in ends] == ["2027-01-01", "2027-01-04", "2027-01-01", None]
