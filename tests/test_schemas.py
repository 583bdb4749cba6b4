from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from perpetuo import schemas
from perpetuo.errors import InvalidRequest
from perpetuo.fields import load_json, moment
from perpetuo.schemas import parse


def faults(model: Any, value: Any, form: bool = False) -> list[str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse(model, value, form=form)
    error = caught.value.body()["error"]
    assert error["code"] == "invalid"
    assert error["param"] == error["details"][0]["param"]
    assert all(detail["message"].endswith(".") for detail in error["details"])
    return [detail["param"] for detail in error["details"]]


def test_all_problems_come_at_once():
    assert faults(schemas.Signup, {"email": "x", "password": "short", "role": "admin"}) == [
        "email",
        "password",
        "role",
    ]


@pytest.mark.parametrize("email", ["", "a", "@b", "a@", "a@b@c", "a b@c", "a\0@b", "a" * 251 + "@b.c", 1])
def test_email_needs_an_address(email: Any):
    assert faults(schemas.Signup, {"email": email, "password": "x" * 8}) == ["email"]


def test_email_is_trimmed_and_lower_case():
    form = parse(schemas.Signup, {"email": " Ada@Example.COM\n", "password": "x" * 8})
    assert form.email == "ada@example.com"


def test_password_is_taken_as_typed():
    password = "  ü" + "x" * 253
    assert parse(schemas.Signup, {"email": "a@b", "password": password}).password == password
    assert faults(schemas.Signup, {"email": "a@b", "password": password + "y"}) == ["password"]
    assert faults(schemas.Signup, {"email": "a@b", "password": "1234567"}) == ["password"]


@pytest.mark.parametrize("name", ["", " ", "x" * 101, "a\nb", "a\x1bb", "a\u2028b", None, 7])
def test_name_is_one_line_of_bounded_length(name: Any):
    assert faults(schemas.CreateApiKey, {"name": name}) == ["name"]


@pytest.mark.parametrize("text", ["\ud800", "a\0b"])
def test_what_a_database_refuses_is_refused_with_its_place(text: str):
    assert faults(schemas.CreateWorkspace, {"name": text}) == ["name"]
    assert faults(schemas.CreateApiKey, {"name": "x", "models": ["a", text]}) == ["models.1"]
    assert faults(schemas.ChangeWorkspace, {"routes": {text: []}}) == ["routes"]
    assert faults(schemas.ChangeWorkspace, {text: 1}) == [None]


@pytest.mark.parametrize("value", [[], "x", 1, None, True])
def test_a_body_is_an_object(value: Any):
    assert faults(schemas.Login, value) == [None]


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("0", 0),
        ("0.1", 10**8),
        ("1e-9", 1),
        ("0.123456789", 123456789),
        ("1000000000", 10**18),
        ("1.50", 15 * 10**8),
    ],
)
def test_money_is_exact(text: str, nano: int):
    form = parse(schemas.ChangeWorkspace, load_json(f'{{"monthly_budget_usd": {text}}}'))
    assert form.monthly_budget_usd == nano


@pytest.mark.parametrize(
    "text",
    ["-1", "0.0000000001", "1000000000.1", '"1"', "true", "[]", "1e99999", "1e-99999", "0." + "1" * 5000],
)
def test_money_outside_its_bounds_is_refused(text: str):
    body = load_json(f'{{"monthly_budget_usd": {text}}}')
    assert faults(schemas.ChangeWorkspace, body) == ["monthly_budget_usd"]


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "[" * 100_000, "1" * 5000, "1e9999999999999999999999", "{"]
)
def test_json_that_is_none_is_refused(text: str):
    with pytest.raises(ValueError):
        load_json(text)


def test_json_is_strict_about_types():
    wrong = {
        "name": "x",
        "rpm_limit": "1",
        "tpm_limit": True,
        "models": "a",
        "expires_at": 1,
        "budget_usd": "1",
    }
    assert set(faults(schemas.CreateApiKey, wrong)) == set(wrong) - {"name"}
    assert faults(schemas.ChangeWorkspace, {"log_bodies": 1}) == ["log_bodies"]


def test_a_form_says_the_same_in_strings():
    form = {"name": "x", "rpm_limit": "60", "models": "gpt-*\r\n\r\n claude-* ", "budget_usd": "0.10"}
    read = parse(schemas.CreateApiKey, form, form=True)
    assert (read.rpm_limit, read.models, read.budget_usd) == (60, ["gpt-*", "claude-*"], 10**8)


def test_a_form_has_json_in_routes_and_prices():
    text = '{"smart": [{"model": "gpt-5", "weight": 2}]}'
    assert parse(schemas.ChangeWorkspace, {"routes": text}, form=True).changes() == {
        "routes": {"smart": [{"model": "gpt-5", "weight": 2}]}
    }
    assert faults(schemas.ChangeWorkspace, {"routes": "{"}, form=True) == ["routes"]
    assert faults(schemas.ChangeWorkspace, {"routes": text}) == ["routes"]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("on", True)])
def test_a_form_has_checkboxes(text: str, value: bool):
    assert parse(schemas.ChangeWorkspace, {"log_bodies": text}, form=True).log_bodies is value


def test_a_patch_knows_absent_from_null():
    assert parse(schemas.ChangeApiKey, {}).changes() == {}
    assert parse(schemas.ChangeApiKey, {"models": None}).changes() == {"models": None}
    assert faults(schemas.ChangeApiKey, {"name": None}) == ["name"]
    assert faults(schemas.ChangeWorkspace, {"name": None, "log_bodies": None}) == ["name", "log_bodies"]


def test_null_puts_a_default_back():
    assert parse(schemas.ChangeApiKey, {"budget_period": None}).changes() == {"budget_period": "month"}
    changes = parse(schemas.ChangeProviderKey, {"priority": None, "weight": None}).changes()
    assert changes == {"priority": 0, "weight": 1}


@pytest.mark.parametrize(
    "time", ["2030-01-01", "2030-01-01T00:00:00", "2030-02-30T00:00:00Z", "20300101T000000Z", "x", 5]
)
def test_expiry_needs_a_time_with_zone(time: Any):
    assert faults(schemas.CreateApiKey, {"name": "x", "expires_at": time}) == ["expires_at"]


def test_expiry_is_in_the_future():
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    assert faults(schemas.CreateApiKey, {"name": "x", "expires_at": past}) == ["expires_at"]
    read = parse(schemas.CreateApiKey, {"name": "x", "expires_at": "2100-01-01T02:00:00+02:00"})
    assert read.expires_at == datetime(2100, 1, 1, tzinfo=UTC)


def test_a_moment_is_a_time_or_a_date():
    assert moment("2026-03-01") == datetime(2026, 3, 1, tzinfo=UTC)
    assert moment("2026-03-01T01:00:00 01:00") == datetime(2026, 3, 1, tzinfo=UTC)
    for text in ("", "0001-01-01", "9999-12-31T23:30:00Z", "2026-13-01", "٢٠٢٦-03-01"):
        with pytest.raises(ValueError):
            moment(text)


def test_prices_need_input_and_output():
    prices = load_json('{"prices": {"gpt-*": {"input": 2.5, "output": 10, "cached_input": 0.25}}}')
    read = parse(schemas.ChangeProviderKey, prices)
    assert read.changes()["prices"] == {"gpt-*": {"input": 2.5, "output": 10, "cached_input": 0.25}}
    bad = load_json('{"prices": {"a": {"input": -1}, "b": {"input": 1, "output": 1, "x": 1}}}')
    assert faults(schemas.ChangeProviderKey, bad) == ["prices.a.input", "prices.a.output", "prices.b.x"]


def test_routes_need_a_target():
    empty = {"a": [], "b": [{}], "c": [{"model": "m", "weight": 0}]}
    found = faults(schemas.ChangeWorkspace, {"routes": empty})
    assert found == ["routes.a", "routes.b.0.model", "routes.c.0.weight"]


def test_a_provider_key_name_has_no_slash():
    assert faults(schemas.CreateProviderKey, {"provider": "openai", "name": "a/b"}) == ["name"]


def test_a_secret_can_travel_in_a_header():
    assert faults(schemas.CreateProviderKey, {"provider": "openai", "api_key": "sk-ü"}) == ["api_key"]
    assert parse(schemas.CreateProviderKey, {"provider": "openai", "api_key": " sk-1\n"}).api_key == "sk-1"
