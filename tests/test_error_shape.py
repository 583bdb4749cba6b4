"""Every error of every route has the one shape."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from perpetuo.errors import Unavailable
from tests.people import Person
from tests.test_access import GUARDED, METHODS, ROUTES, fill

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
IDS = dict.fromkeys(("workspace_id", "provider_key_id", "api_key_id", "log_id"), "nothing")
HTML = {"Accept": "text/html"}


def check(response: Any) -> None:
    assert response.status_code >= 400
    assert response.mimetype == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.get_json()) == ["error"]
    error = response.get_json()["error"]
    assert list(error)[:4] == ["message", "type", "param", "code"]
    assert set(error) <= {"message", "type", "param", "code", "details"}
    assert error["message"]
    usual = "server_error" if response.status_code >= 500 else "invalid_request_error"
    assert error["type"] == TYPES.get(response.status_code, usual)


def test_the_unknown_and_the_foreign(app: Flask, subtests: pytest.Subtests):
    person = Person(app)
    for endpoint, rule, method in GUARDED:
        with subtests.test(endpoint, method=method):
            check(app.test_client().open(fill(rule, IDS), method=method))
            check(app.test_client().open(fill(rule, IDS), method=method, headers={"Host": "evil.example"}))
            if "<" in rule:
                check(person.open(method, fill(rule, IDS)))


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"unknown": 1}', b"\xff"])
def test_bodies_that_cannot_be_used(app: Flask, subtests: pytest.Subtests, body: bytes):
    person = Person(app)
    for endpoint, rule, method in ROUTES:
        if method == "POST" and "<" not in rule and endpoint != "auth.logout":
            with subtests.test(endpoint):
                check(person.open(method, rule, data=body, content_type="application/json"))


@pytest.mark.parametrize("error", [Unavailable("The database is away."), RuntimeError("a detail")])
def test_a_database_away_and_a_bug(
    app: Flask, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests, error: Exception
):
    def fail(*_: Any) -> None:
        raise error

    person = Person(app)
    monkeypatch.setattr(app.extensions["perpetuo"].database, "read", fail)
    for endpoint, rule, method in GUARDED:
        with subtests.test(endpoint, method=method):
            response = person.open(method, fill(rule, IDS))
            check(response)
            assert response.status_code in (500, 503)
            assert "a detail" not in response.text


PATHS = ["/nothing", "/workspaces/x/nothing", "/v1/nothing", "/v1", "/%00", "/%ff", "/a//b"]


@pytest.mark.parametrize("path", PATHS)
def test_unknown_urls_and_methods(app: Flask, path: str):
    for method in (*METHODS, "TRACE", "NONSENSE"):
        check(app.test_client().open(path, method=method, headers=HTML))


def test_wrong_methods_of_known_urls(app: Flask, subtests: pytest.Subtests):
    for rule in sorted({rule for endpoint, rule, _ in ROUTES if endpoint != "static"}):
        with subtests.test(rule):
            check(app.test_client().open(fill(rule, IDS), method="NONSENSE", headers=HTML))


def test_a_page_gets_the_same_shape_until_it_has_a_template(app: Flask):
    check(app.test_client().post("/auth/login", data={}, headers=HTML))
