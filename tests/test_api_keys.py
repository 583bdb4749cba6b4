from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from flask import Flask

from perpetuo import crypto
from perpetuo.gateway.walk import Gateway
from perpetuo.models import ApiKey
from perpetuo.periods import period_start
from tests.books import add_counter
from tests.people import Browser, Person

SHAPE = (
    "id name prefix created_at expires_at revoked_at last_used_at models rpm_limit tpm_limit "
    "budget_usd budget_period spent_usd held_usd resets_at"
)


def test_the_key_is_shown_once_and_stored_as_a_hash(app: Flask, gateway: Gateway):
    person = Person(app)
    body = person.api_key()
    key = body.pop("key")
    assert " ".join(body) == SHAPE
    assert crypto.is_api_key(key)
    assert key.startswith(body["prefix"])
    assert person.get(f"api-keys/{body['id']}").get_json() == body
    query = sa.select(ApiKey.__table__).where(ApiKey.id == body["id"])
    row = gateway.database.read(lambda connection: connection.execute(query).one())
    assert row.hash == crypto.hash_api_key(key)
    assert key[11:] not in str(tuple(row))


def test_limits_come_back_as_given(app: Flask):
    fields = {
        "models": ["gpt-*"],
        "rpm_limit": 60,
        "tpm_limit": 10_000,
        "budget_usd": 2.5,
        "budget_period": "week",
        "expires_at": "2100-01-01T00:00:00.000000Z",
    }
    body = Person(app).api_key(**fields)
    assert {name: body[name] for name in fields} == fields
    resets_at = datetime.fromisoformat(body["resets_at"])
    assert resets_at.weekday() == 0
    assert timedelta(0) < resets_at - datetime.now(UTC) <= timedelta(days=7)


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({"name": ""}, "name"),
        ({"rpm_limit": 0}, "rpm_limit"),
        ({"tpm_limit": 10**9 + 1}, "tpm_limit"),
        ({"budget_period": "year"}, "budget_period"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"models": []}, "models"),
        ({"models": ["x"] * 501}, "models"),
        ({"key": "pk_mine"}, "key"),
        ({"hash": "x"}, "hash"),
        ({"revoked_at": None}, "revoked_at"),
    ],
)
def test_what_cannot_be_is_refused(app: Flask, fields: dict, at_fault: str):
    response = Person(app).post("api-keys", {"name": "x", **fields})
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, at_fault)


def test_a_patch_clears_with_null(app: Flask):
    person = Person(app)
    id = person.api_key(rpm_limit=60, budget_usd=1, models=["a"], expires_at="2100-01-01T00:00:00Z")["id"]
    cleared = {"rpm_limit": None, "budget_usd": None, "models": None, "expires_at": None}
    body = person.patch(f"api-keys/{id}", cleared).get_json()
    assert {name: body[name] for name in cleared} == cleared
    assert body["name"] == "test"


def test_a_revoked_key_stays_in_the_list_revoked_for_good(app: Flask):
    person = Person(app)
    url = f"api-keys/{person.api_key()['id']}"
    assert person.delete(url).status_code == 204
    first = person.get("api-keys").get_json()["data"][0]
    assert first["revoked_at"]
    assert person.post(f"{url}/delete").status_code == 204
    assert person.patch(url, {"name": "new"}).get_json() == {**first, "name": "new"}


def test_without_a_request_nothing_is_spent(app: Flask):
    body = Person(app).api_key()
    assert (body["spent_usd"], body["held_usd"]) == (0, 0)


@pytest.mark.parametrize("period", ["day", "week", "month", "total"])
def test_spending_is_that_of_the_present_period(app: Flask, gateway: Gateway, period: str):
    person = Person(app)
    id = person.api_key(budget_period=period)["id"]
    start = period_start(period, datetime.now(UTC))
    add_counter(gateway, person.workspace, api_key_id=id, hour=start, cost_nano=10**9)
    add_counter(
        gateway, person.workspace, api_key_id=id, hour=start - timedelta(hours=1), cost_nano=7 * 10**9
    )
    add_counter(gateway, person.workspace, api_key_id="key_other", hour=start, cost_nano=7 * 10**9)
    body = person.get(f"api-keys/{id}").get_json()
    assert body["spent_usd"] == 1
    assert person.get("api-keys").get_json()["data"] == [body]
    assert (body["resets_at"] is None) == (period == "total")


def test_spending_is_null_only_where_nothing_had_a_price(app: Flask, gateway: Gateway):
    person = Person(app)
    id = person.api_key()["id"]
    add_counter(gateway, person.workspace, api_key_id=id, model="a", requests=2, unpriced_requests=2)
    add_counter(gateway, person.workspace, api_key_id=id, model="", refused=1)
    assert person.get(f"api-keys/{id}").get_json()["spent_usd"] is None
    add_counter(gateway, person.workspace, api_key_id=id, model="b", cost_nano=5)
    assert person.get(f"api-keys/{id}").get_json()["spent_usd"] == 5e-9


def test_a_browser_sees_the_new_key_in_the_answer_of_its_own_post(app: Flask):
    person = Person(app)
    url = f"/workspaces/{person.workspace}/api-keys"
    response = Browser(app, person).open("POST", url, data={"name": "x", "models": "", "rpm_limit": "60"})
    assert response.status_code in (200, 201)
    assert response.get_json()["key"].startswith("pk_")
    assert response.headers["Cache-Control"] == "no-store"
    assert "Location" not in response.headers
