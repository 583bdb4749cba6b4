import io
import logging

import pytest
from flask import Flask
from flask.testing import FlaskClient

from perpetuo import create_app, guard, web
from perpetuo.config import load
from perpetuo.errors import Unavailable
from perpetuo.made_secrets import fresh
from tests.people import Browser, Person

HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("headers", "face"),
    [
        ({}, "json"),
        ({"Accept": "*/*"}, "json"),
        ({"Accept": "application/json"}, "json"),
        ({"Accept": HTML}, "page"),
        ({"Accept": "text/html;q=0.5, application/json"}, "json"),
        ({"Accept": "text/html;q=0"}, "json"),
        ({"Accept": "text/*"}, "json"),
        ({"HX-Request": "true"}, "fragment"),
        ({"HX-Request": "false", "Accept": HTML}, "page"),
        ({"HX-Request": "true", "HX-Boosted": "true", "Accept": HTML}, "page"),
        ({"HX-Request": "true", "HX-History-Restore-Request": "true"}, "page"),
        ({"HX-Request": "true", "Authorization": "Bearer x"}, "json"),
        ({"Accept": HTML, "Authorization": "bearer"}, "json"),
        ({"Accept": HTML, "Authorization": "Basic eDp5"}, "page"),
    ],
)
def test_the_face_follows_the_request(app: Flask, headers: dict[str, str], face: str):
    with app.test_request_context("/workspaces", headers=headers):
        assert web.face() == face


def test_every_management_answer_is_private_and_framed_by_nobody(app: Flask):
    for response in (Person(app).get("/workspaces"), app.test_client().get("/workspaces")):
        assert response.headers["Vary"] == "Accept, HX-Request, Cookie, Authorization"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
        assert "unsafe" not in response.headers["Content-Security-Policy"]
        assert "Strict-Transport-Security" not in response.headers


def test_the_request_id_is_ours_and_new_each_time(client: FlaskClient):
    ids = {client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(id.startswith("req_") for id in ids)


def test_without_sign_in_a_page_goes_to_the_login(client: FlaskClient):
    response = client.get("/workspaces?limit=3", headers={"Accept": HTML})
    assert response.status_code == 303
    assert response.location == "/auth/login?next=/workspaces%3Flimit%3D3"


def test_without_sign_in_a_fragment_is_told_where_to_go(client: FlaskClient):
    headers = {"HX-Request": "true", "HX-Current-URL": "http://localhost/workspaces/x"}
    response = client.post("/workspaces", headers=headers)
    assert response.status_code == 401
    assert response.headers["HX-Redirect"] == "/auth/login?next=/workspaces/x"


def test_without_sign_in_a_program_gets_401(client: FlaskClient):
    response = client.get("/workspaces")
    assert response.status_code == 401
    assert response.get_json()["error"]["code"] == "unauthorized"


@pytest.mark.parametrize(
    "text", ["//evil", "/\\evil", "https:evil", "%2f%2fevil", "/\t/evil", "/%09/evil", "/%2fevil"]
)
def test_next_is_a_local_path_or_nothing(text: str):
    assert guard.safe_next(text) == "/"


def test_next_keeps_a_local_path():
    assert guard.safe_next("/workspaces/x?a=%20b") == "/workspaces/x?a=%20b"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:80"])
def test_our_hosts_are_served(client: FlaskClient, host: str):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.com", "localhost.evil.com", "a?b", "a/b", "a@b", "evil@localhost", "localhost:x", "", "127.0.0.2"],
)
def test_other_hosts_are_refused_everywhere_but_in_the_gateway(app: Flask, host: str):
    person = Person(app)
    for path in ("/", "/auth/me", "/nothing", "/auth/login"):
        response = person.get(path, headers={"Host": host})
        assert (response.status_code, response.get_json()["error"]["code"]) == (400, "invalid_host")
    for path, status in (("/healthz", 200), ("/v1/models", 401)):
        assert app.test_client().get(path, headers={"Host": host}).status_code == status


def test_production_serves_its_public_host_only(tmp_path):
    environ = {"PERPETUO_ENV": "production", "PUBLIC_URL": "https://gate.test", **fresh()}
    settings = load({**environ, "DATABASE_URL": f"sqlite:///{tmp_path}/x.db"})
    client = create_app(settings).test_client()
    statuses = {
        h: client.get("/", headers={"Host": h}).status_code
        for h in ("gate.test", "gate.test:443", "localhost")
    }
    assert statuses == {"gate.test": 200, "gate.test:443": 200, "localhost": 400}
    response = client.get("/", headers={"Host": "gate.test"})
    assert response.headers["Strict-Transport-Security"].startswith("max-age=")


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b'{"name": NaN}', "application/json", 400, "invalid_json"),
        (b"\xff", "application/json", 400, "invalid_json"),
        (b"[" * 200_000, "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid"),
        (b"", "application/json", 400, "invalid"),
        (b'{"name": "x"}', "text/plain", 415, "unsupported_media_type"),
        (b'{"name": "x"}', None, 415, "unsupported_media_type"),
        (b"x" * 1_100_000, "application/json", 413, "request_too_large"),
        (b"name=\xff%00", "application/x-www-form-urlencoded", 400, "invalid"),
        (b"garbage", "multipart/form-data", 400, "invalid"),
    ],
)
def test_bodies_that_cannot_be_read(app: Flask, body: bytes, kind: str | None, status: int, code: str):
    response = Person(app).open("POST", "/workspaces", data=body, content_type=kind)
    assert (response.status_code, response.get_json()["error"]["code"]) == (status, code)


def test_a_chunked_body_is_bounded_too(app: Flask):
    chunked = {"wsgi.input": _Endless(), "wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    response = Person(app).open(
        "POST", "/workspaces", content_type="application/json", environ_overrides=chunked
    )
    assert response.status_code == 413


class _Endless(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return b" " * size


def test_a_form_is_read_like_json(app: Flask):
    person = Person(app)
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data"):
        response = person.open("POST", "/workspaces", data={"name": "from a form"}, content_type=kind)
        assert response.get_json()["name"] == "from a form"


def test_in_a_form_the_last_value_wins_and_empty_is_null(app: Flask):
    person = Person(app)
    form = {"log_bodies": ["false", "true"], "retention_days": "", "name": "x"}
    body = person.open("POST", "", data=form).get_json()
    assert (body["log_bodies"], body["retention_days"]) == (True, None)


def test_a_page_gets_422_with_all_problems(app: Flask):
    response = Browser(app, Person(app)).open("POST", "/workspaces", data={"x": "1"})
    assert response.status_code == 422
    assert [detail["param"] for detail in response.get_json()["error"]["details"]] == ["name", "x"]


def test_a_plain_form_goes_on_with_303_and_a_fragment_stays(app: Flask):
    person = Person(app)
    visitor = Browser(app, person)
    response = visitor.open("POST", f"/workspaces/{person.workspace}", data={"name": "new"})
    assert (response.status_code, response.location) == (303, f"/workspaces/{person.workspace}")
    response = visitor.open("POST", "/workspaces", data={"name": "new"}, headers={"HX-Request": "true"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/workspaces/", "/auth/me/"])
def test_a_trailing_slash_changes_nothing(app: Flask, path: str):
    assert Person(app).get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/auth//me", "/./workspaces/x", "/WORKSPACES", "/workspaces;x", "/auth/%2e%2e/workspaces"]
)
def test_odd_spellings_are_not_found_and_not_redirected(app: Flask, path: str):
    assert Person(app).get(path).status_code == 404


def test_a_bug_is_logged_and_tells_nothing(app: Flask, caplog: pytest.LogCaptureFixture):
    @app.get("/broken")
    def broken():
        raise RuntimeError("a detail")

    with caplog.at_level(logging.ERROR):
        response = app.test_client().get("/broken")
    assert response.status_code == 500
    assert response.get_json()["error"]["code"] == "internal_error"
    assert "a detail" not in response.text
    assert "a detail" in caplog.text
    assert response.headers["x-request-id"].startswith("req_")


def test_a_database_away_gives_503_with_retry_after(app: Flask, monkeypatch: pytest.MonkeyPatch):
    person = Person(app)

    def away(*_):
        raise Unavailable("The database cannot be reached.")

    monkeypatch.setattr(app.extensions["perpetuo"].database, "read", away)
    response = person.get("/workspaces")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert app.test_client().get("/readyz").status_code == 503
    assert app.test_client().get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("accept", "kind"), [("*/*", "application/json"), (HTML, "text/html"), ("text/plain", "text/plain")]
)
def test_the_root_says_what_this_is(client: FlaskClient, accept: str, kind: str):
    response = client.get("/", headers={"Accept": accept})
    assert response.mimetype == kind
    assert "PERPETUO" in response.text


def test_v1_neither_reads_nor_sets_cookies(app: Flask):
    visitor = Browser(app, Person(app))
    response = visitor.open("GET", "/v1/models")
    assert response.status_code == 401
    assert "Cookie" not in response.headers.get("Vary", "")
    assert "Set-Cookie" not in response.headers
