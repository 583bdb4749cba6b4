"""The litany of access: every route and method, asked by those who may not.

What must change nothing is asked on one application after the other, each route a subtest.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from perpetuo import create_app
from perpetuo.config import load
from perpetuo.gateway.walk import Gateway
from perpetuo.models import ApiKey, ProviderKey, RequestLog, UsageCounter, User, Workspace
from tests.books import add_counter, add_log
from tests.people import Browser, Person

# Who may: `public`, `user` (signed in), `workspace` (the owner), or the object in it; `gateway` is `/v1`.
POLICY = {
    "static": "public",
    "web.home": "public",
    "web.healthz": "public",
    "web.readyz": "public",
    "web.metrics": "public",  # or by its own token: test_metrics.py
    "auth.signup": "public",
    "auth.login": "public",
    "auth.logout": "user",
    "auth.me": "user",
    "auth.change_me": "user",
    "workspaces.list_workspaces": "user",
    "workspaces.create_workspace": "user",
    "workspaces.show_workspace": "workspace",
    "workspaces.change_workspace": "workspace",
    "workspaces.delete_workspace": "workspace",
    "workspaces.list_provider_keys": "workspace",
    "workspaces.create_provider_key": "workspace",
    "workspaces.show_provider_key": "provider_key",
    "workspaces.change_provider_key": "provider_key",
    "workspaces.delete_provider_key": "provider_key",
    "workspaces.test_provider_key": "provider_key",
    "workspaces.list_api_keys": "workspace",
    "workspaces.create_api_key": "workspace",
    "workspaces.show_api_key": "api_key",
    "workspaces.change_api_key": "api_key",
    "workspaces.revoke_api_key": "api_key",
    "logs.list_logs": "workspace",
    "logs.show_log": "log",
    "logs.export_csv": "workspace",
    "logs.export_jsonl": "workspace",
    "logs.show_usage": "workspace",
}
OBJECTS = ("provider_key", "api_key", "log")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
CANARY = "canary-7d1f"
TABLES = (User, Workspace, ProviderKey, ApiKey, RequestLog, UsageCounter)


def url_map(tmp: str = "/nonexistent") -> list[tuple[str, str, str]]:
    """(endpoint, rule, method) of everything that is served, methods that come by themselves left out."""
    secrets = {"SECRET_KEY": "x" * 40, "ENCRYPTION_KEYS": "a:" + "A" * 43 + "="}
    app = create_app(load({**secrets, "PERPETUO_DATA": tmp}))
    rules = sorted(app.url_map.iter_rules(), key=lambda rule: (rule.rule, rule.endpoint))
    found = [(r.endpoint, r.rule, m) for r in rules for m in METHODS if m in (r.methods or ())]
    return [route for route in found if not route[1].startswith("/v1")]


ROUTES = url_map()
GUARDED = [route for route in ROUTES if POLICY.get(route[0], "user") != "public"]
OWNED = [route for route in GUARDED if POLICY.get(route[0]) not in ("user", None)]
INSIDE = [route for route in OWNED if POLICY[route[0]] in OBJECTS]
UNSAFE = [route for route in GUARDED if route[2] != "GET"]


class Victim(Person):
    """A person with one of everything, each with a canary in it."""

    def __init__(self, app: Flask) -> None:
        super().__init__(app, email=f"{CANARY}-{next(itertools.count())}@example.com")
        gateway = app.extensions["perpetuo"]
        self.patch("", {"name": CANARY})
        provider_key = {"name": CANARY, "provider": "custom", "base_url": "http://127.0.0.1:9/v1"}
        log = {"preview_prompt": CANARY, "model": CANARY, "end_user": CANARY}
        self.ids = {
            "workspace_id": self.workspace,
            "provider_key_id": self.provider_key(**provider_key, api_key=f"sk-{CANARY}")["id"],
            "api_key_id": self.api_key(name=CANARY)["id"],
            "log_id": add_log(gateway, self.workspace, **log),
        }
        add_counter(gateway, self.workspace, model=CANARY)


def fill(rule: str, ids: dict[str, str]) -> str:
    for name, id in ids.items():
        rule = rule.replace(f"<{name}>", id)
    assert "<" not in rule, f"{rule}: the litany knows no such id"
    return rule


def dump(gateway: Gateway) -> list[Any]:
    """Everything that is stored."""

    def rows(connection: sa.Connection) -> list[Any]:
        return [list(connection.execute(sa.select(model.__table__))) for model in TABLES]

    return gateway.database.read(rows)


def ask(person: Person, method: str, url: str) -> Any:
    return person.open(method, url, json={"name": "taken"} if method in ("POST", "PATCH") else None)


def code(response: Any) -> str:
    return response.get_json()["error"]["code"]


@pytest.fixture
def victim(app: Flask) -> Victim:
    return Victim(app)


def test_every_route_has_a_policy():
    assert {endpoint for endpoint, _, _ in ROUTES} == set(POLICY)


def test_anonymous_gets_401(app: Flask, gateway: Gateway, victim: Victim, subtests: pytest.Subtests):
    before, client = dump(gateway), app.test_client()
    for endpoint, rule, method in GUARDED:
        with subtests.test(endpoint, method=method):
            response = client.open(fill(rule, victim.ids), method=method, json={"name": "x"})
            assert (response.status_code, code(response)) == (401, "unauthorized")
            assert CANARY not in response.text
            assert dump(gateway) == before


def test_a_stranger_gets_404(app: Flask, gateway: Gateway, victim: Victim, subtests: pytest.Subtests):
    stranger = Person(app)
    before, missing_ids = dump(gateway), dict.fromkeys(victim.ids, "nothing")
    for endpoint, rule, method in OWNED:
        with subtests.test(endpoint, method=method):
            response = ask(stranger, method, fill(rule, victim.ids))
            assert response.status_code == 404
            assert response.get_data() == ask(stranger, method, fill(rule, missing_ids)).get_data()
            assert CANARY not in response.text
            assert dump(gateway) == before


def test_an_owner_cannot_reach_a_foreign_object(
    app: Flask, gateway: Gateway, victim: Victim, subtests: pytest.Subtests
):
    owner = Person(app)
    before, ids = dump(gateway), {**victim.ids, "workspace_id": owner.workspace}
    for endpoint, rule, method in INSIDE:
        with subtests.test(endpoint, method=method):
            response = ask(owner, method, fill(rule, ids))
            assert response.status_code == 404
            assert CANARY not in response.text
            assert dump(gateway) == before


def test_an_object_is_in_one_of_the_owners_workspaces(
    victim: Victim, gateway: Gateway, subtests: pytest.Subtests
):
    other = victim.post("/workspaces", {"name": "other"}).get_json()["id"]
    before = dump(gateway)
    for endpoint, rule, method in INSIDE:
        with subtests.test(endpoint, method=method):
            assert ask(victim, method, fill(rule, {**victim.ids, "workspace_id": other})).status_code == 404
            assert dump(gateway) == before


def test_the_owner_reads_what_is_his(victim: Victim, subtests: pytest.Subtests):
    for endpoint, rule, method in GUARDED:
        if method == "GET":
            with subtests.test(endpoint):
                response = victim.get(fill(rule, victim.ids))
                assert response.status_code == 200
                assert f"sk-{CANARY}" not in response.text


def test_a_wrong_method_gets_405_with_allow(victim: Victim, subtests: pytest.Subtests):
    for url in sorted({rule for _, rule, _ in GUARDED}):
        allowed = {method for _, rule, method in ROUTES if rule == url}
        for method in set(METHODS) - allowed:
            with subtests.test(url, method=method):
                response = victim.open(method, fill(url, victim.ids))
                assert (response.status_code, code(response)) == (405, "method_not_allowed")
                assert allowed <= set(response.headers["Allow"].split(", "))


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "nonsense"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "https://localhost"},
    {"Origin": "null"},
    {"Origin": ""},
]


def test_another_site_cannot_use_the_cookie(
    app: Flask, gateway: Gateway, victim: Victim, subtests: pytest.Subtests
):
    visitor = Browser(app, victim)
    visitor.headers = {"Accept": "text/html", "X-HTTP-Method-Override": "GET"}
    before = dump(gateway)
    for (endpoint, rule, method), headers in itertools.product(UNSAFE, FOREIGN):
        with subtests.test(endpoint, method=method, **headers):
            response = visitor.open(method, fill(rule, victim.ids), data={"name": "x"}, headers=headers)
            assert (response.status_code, code(response)) == (403, "forbidden_origin")
    assert dump(gateway) == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "http://localhost"},
        {},
    ],
)
def test_our_own_pages_may_use_the_cookie(app: Flask, victim: Victim, headers: dict[str, str]):
    visitor = Browser(app, victim)
    visitor.headers = headers
    assert visitor.open("POST", "/workspaces", json={"name": "mine"}).status_code == 201


def test_a_token_is_nobody_elses_to_send(app: Flask, victim: Victim):
    response = victim.post("/workspaces", {"name": "x"}, headers={"Sec-Fetch-Site": "cross-site"})
    assert response.status_code == 201


def test_what_is_in_a_foreign_workspace_cannot_be_filtered_for(app: Flask, victim: Victim):
    stranger = Person(app)
    for path in (
        f"logs?workspace_id={victim.workspace}",
        f"logs?q={CANARY}",
        "usage",
        "logs.csv",
        "logs.jsonl",
    ):
        assert CANARY not in stranger.get(path).text


def test_another_users_cursor_leads_nowhere(app: Flask, gateway: Gateway, victim: Victim):
    add_log(gateway, victim.workspace, preview_prompt=CANARY)
    cursor = victim.get("logs?limit=1").get_json()["next_cursor"]
    assert Person(app).get(f"logs?cursor={cursor}").get_json()["data"] == []


def test_a_secret_is_in_no_dump(app: Flask, gateway: Gateway, victim: Victim):
    assert f"sk-{CANARY}" not in json.dumps(dump(gateway), default=str)
