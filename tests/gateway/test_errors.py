import itertools
import json
import socket
import sqlite3
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from perpetuo import crypto
from perpetuo.gateway import access as access_module
from perpetuo.gateway import ledger as ledger_module
from perpetuo.models import ProviderKey
from tests.conftest import BACKENDS
from tests.fake_upstream import (
    cut_after,
    empty,
    event,
    hang,
    headers_then_hang,
    html,
    raw,
    redirect,
    reset_after,
    status,
    stream,
)
from tests.gateway.conftest import CHAT, with_settings
from tests.tenants import new_tenant

SECRET = "sk-very-secret-9f8e7d6c"
STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])


def on(backend):
    """Only with this database."""
    chosen = [name for name in BACKENDS if name == backend]
    return pytest.mark.parametrize("database_url", chosen, indirect=True)


@pytest.fixture(autouse=True)
def always(books_at_the_end):
    """Every test here ends with books that balance."""


def error_of(response, status, type, code):
    """The error of an answer, in the one shape."""
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.mimetype == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    assert set(response.json) == {"error"}
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert (error["type"], error["code"]) == (type, code)
    return error


def assert_row(logs, response, status, code):
    """Its row says the same as the answer."""
    (row,) = [row for row in logs() if row["id"] == response.headers["x-request-id"]]
    assert (row["status"], row["http_status"]) == (status, response.status_code)
    assert (row["error_type"], row["error_code"]) == (response.json["error"]["type"], code)
    assert row["error_message"] == response.json["error"]["message"]
    assert row["cost_nano"] == 0
    return row


# Before the key is looked at.


def test_an_unknown_path_is_404_without_a_key_and_leaves_no_row(client, tenant, logs):
    paths = ("", "/", "/nothing", "/chat", "/chat/completions/x", "/completions", "/responses/resp_1")
    for path, headers in itertools.product(paths, ({}, tenant.headers)):
        response = client.post(f"/v1{path}", json=CHAT, headers=headers)
        error_of(response, 404, "invalid_request_error", "endpoint_not_supported")
    assert logs() == []


def test_responses_of_a_provider_without_them_points_to_the_chat_setting(client, tenant, upstream, logs):
    tenant.add_provider_key(upstream.base_url, provider="groq")
    response = client.post("/v1/responses", json={"model": "groq/x", "input": "hi"}, headers=tenant.headers)
    error = error_of(response, 404, "invalid_request_error", "endpoint_not_supported")
    assert "chat" in error["message"]
    assert_row(logs, response, "refused", "endpoint_not_supported")
    assert upstream.requests == []


WRONG_METHODS = [
    ("GET", "chat/completions", "POST"),
    ("PUT", "embeddings", "POST"),
    ("DELETE", "models", "GET"),
    ("POST", "models/gpt-4o", "GET"),
    ("TRACE", "chat/completions", "POST"),
    ("PROPFIND", "models", "GET"),
]


def test_a_wrong_method_is_405_and_says_which_is_right(client, logs):
    for (method, path, allow), slash in itertools.product(WRONG_METHODS, ("", "/")):
        response = client.open(f"/v1/{path}{slash}", method=method)
        error_of(response, 405, "invalid_request_error", "method_not_allowed")
        assert response.headers["Allow"] == allow
    assert logs() == []


def test_a_trailing_slash_makes_no_difference(ask):
    assert ask("/v1/chat/completions/").status_code == 200


def test_every_answer_has_an_id_of_our_own(ask, client):
    responses = [ask(headers={"x-request-id": "theirs"}), client.get("/v1/models"), client.get("/v1")]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == 3
    assert all(request_id.startswith("req_") for request_id in ids)


# The key.


def unknown_key(tenant):
    return f"Bearer {crypto.new_api_key()}"


def expired_key(tenant):
    return f"Bearer {tenant.add_api_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))}"


def revoked_key(tenant):
    return f"Bearer {tenant.add_api_key(revoked_at=datetime.now(UTC))}"


def damaged_key(tenant):
    return f"Bearer {tenant.key[:-1]}{'a' if tenant.key[-1] != 'a' else 'b'}"


NOT_A_KEY = [
    unknown_key,
    expired_key,
    revoked_key,
    damaged_key,
    lambda tenant: f"Basic {tenant.key}",
    lambda tenant: tenant.key,
    lambda tenant: f"Bearer {tenant.key} {tenant.key}",
    lambda tenant: f"Bearer {tenant.key}\xe9",
    lambda tenant: "Bearer ",
]


def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(client, tenant, upstream, logs):
    bodies = set()
    for header in NOT_A_KEY:
        response = client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": header(tenant)})
        error_of(response, 401, "authentication_error", "invalid_api_key")
        bodies.add(response.get_data())
    assert len(bodies) == 1
    assert (upstream.requests, logs()) == ([], [])


def test_no_key_is_401_and_leaves_no_row(client, logs):
    for headers in ({}, {"Authorization": ""}):
        response = client.post("/v1/chat/completions", json=CHAT, headers=headers)
        error_of(response, 401, "authentication_error", "invalid_api_key")
    assert logs() == []


def test_models_need_a_key_too(client, tenant):
    for path in ("/v1/models", "/v1/models/gpt-4o"):
        error_of(client.get(path), 401, "authentication_error", "invalid_api_key")


def test_a_cookie_is_no_key(client, tenant):
    client.set_cookie("session", tenant.key)
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 401


# Room.


@with_settings(max_in_flight=6)
def test_a_workspace_may_fill_half_the_process_and_no_more(ask, client, gateway, tenant, logs):
    held = [gateway.calls.begin(tenant.workspace_id, 60) for _ in range(3)]
    response = ask()
    error_of(response, 503, "server_error", "overloaded")
    assert response.headers["retry-after"] == "1"
    assert_row(logs, response, "refused", "overloaded")
    other = new_tenant(gateway)
    response = client.post("/v1/chat/completions", json=CHAT, headers=other.headers)
    assert response.json["error"]["code"] == "model_not_found"
    for call in held:
        call.close()
    assert ask().status_code == 200


@with_settings(max_in_flight=4)
def test_a_full_process_takes_nobody(ask, gateway, logs):
    held = [gateway.calls.begin(f"ws_{number % 2}", 60) for number in range(4)]
    response = ask()
    error_of(response, 503, "server_error", "overloaded")
    assert_row(logs, response, "refused", "overloaded")
    for call in held:
        call.close()


def test_a_process_that_shuts_down_takes_no_calls_and_is_not_ready(ask, client, gateway, logs):
    gateway.calls.is_draining = True
    response = ask()
    error_of(response, 503, "server_error", "shutting_down")
    assert response.headers["retry-after"] == "1"
    assert_row(logs, response, "refused", "shutting_down")
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


# The body.


@with_settings(max_body_bytes=2000)
def test_a_body_too_large_is_413(ask, upstream, logs):
    response = ask(user="x" * 2000)
    error_of(response, 413, "invalid_request_error", "request_too_large")
    assert_row(logs, response, "refused", "request_too_large")
    assert upstream.requests == []
    assert ask(user="x" * 1800).status_code == 200


def test_a_compressed_body_is_415(ask, logs):
    response = ask(headers={"Content-Encoding": "gzip"})
    error_of(response, 415, "invalid_request_error", "unsupported_encoding")
    assert_row(logs, response, "refused", "unsupported_encoding")


def test_any_content_type_is_read_as_json(client, tenant):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""):
        headers = {**tenant.headers, "Content-Type": content_type}
        response = client.post("/v1/chat/completions", data=json.dumps(CHAT), headers=headers)
        assert response.status_code == 200


MESSAGES = '"messages": [{"role": "user", "content": "x"}]'
UNREADABLE = {
    "empty": b"",
    "half an object": b'{"model": "gpt-4o"',
    "a form": b"model=gpt-4o",
    "NaN": f'{{"model": "gpt-4o", {MESSAGES}, "temperature": NaN}}'.encode(),
    "Infinity": f'{{"model": "gpt-4o", {MESSAGES}, "temperature": -Infinity}}'.encode(),
    "beyond floats": f'{{"model": "gpt-4o", {MESSAGES}, "temperature": 1e999}}'.encode(),
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "two objects": b"{} {}",
    "100,000 deep": b'{"model": "gpt-4o", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 deep, never closed": b"[" * 100_000,
    "invalid UTF-8": b'{"model": "gpt-4o\xff", "messages": [1]}',
    "a byte-order mark": b"\xef\xbb\xbf" + json.dumps(CHAT).encode(),
    "UTF-16": json.dumps(CHAT).encode("utf-16"),
}


MANY_PARTS = b'{"model": "gpt-4o", "messages": [' + b"[]," * 500_000 + b"[]]}"
MANY_MEMBERS = b'{"model": "gpt-4o"' + b"".join(b', "m%d": 1' % n for n in range(1000)) + b"}"


@pytest.mark.parametrize("body", [MANY_PARTS, MANY_MEMBERS], ids=["parts", "members"])
def test_a_shape_that_would_keep_the_parser_busy_is_refused(client, tenant, logs, upstream, body):
    response = client.post("/v1/chat/completions", data=body, headers=tenant.headers)
    error_of(response, 400, "invalid_request_error", "invalid_json")
    assert_row(logs, response, "refused", "invalid_json")
    assert upstream.requests == []


def test_what_is_no_json_object_is_invalid_json(client, tenant, upstream, logs):
    for body in UNREADABLE.values():
        response = client.post("/v1/chat/completions", data=body, headers=tenant.headers)
        assert error_of(response, 400, "invalid_request_error", "invalid_json")["param"] is None, body[:99]
        assert_row(logs, response, "refused", "invalid_json")
    assert upstream.requests == []


def test_a_field_that_decides_must_not_stand_twice(client, tenant, upstream, logs):
    first = {**CHAT, "stream": False, "models": ["gpt-4o"], "n": 1, "max_tokens": 1}
    for name, value in first.items():
        escaped = f"\\u{ord(name[0]):04x}{name[1:]}"
        body = json.dumps(first)[:-1] + f', "{escaped}": {json.dumps(value)}}}'
        response = client.post("/v1/chat/completions", data=body, headers=tenant.headers)
        assert error_of(response, 400, "invalid_request_error", "invalid_json")["param"] == name
        assert_row(logs, response, "refused", "invalid_json")
    assert upstream.requests == []


MISFITS = [
    ("model", None),
    ("model", 4),
    ("model", ""),
    ("model", "  "),
    ("model", ["gpt-4o"]),
    ("models", "gpt-4o"),
    ("models", [1]),
    ("models", [""]),
    ("models", {}),
    ("messages", None),
    ("messages", []),
    ("messages", "hello"),
    ("messages", {}),
    ("stream", "true"),
    ("stream", 1),
]


def test_a_field_of_the_wrong_type_is_named(ask, upstream, logs):
    for name, value in MISFITS:
        response = ask(**{name: value})
        assert error_of(response, 400, "invalid_request_error", None)["param"] == name
        assert_row(logs, response, "refused", None)
    assert upstream.requests == []


def test_a_missing_field_is_named(client, tenant, logs):
    for name in CHAT:
        body = {key: value for key, value in CHAT.items() if key != name}
        response = client.post("/v1/chat/completions", json=body, headers=tenant.headers)
        assert error_of(response, 400, "invalid_request_error", None)["param"] == name
        assert_row(logs, response, "refused", None)


def test_embeddings_need_an_input(client, tenant, logs):
    for given in ({}, {"input": None}, {"input": 1}, {"input": {}}):
        body = {"model": "text-embedding-3-small", **given}
        response = client.post("/v1/embeddings", json=body, headers=tenant.headers)
        assert error_of(response, 400, "invalid_request_error", None)["param"] == "input"
        assert assert_row(logs, response, "refused", None)["endpoint"] == "embeddings"


# The model.


def test_a_model_that_the_key_may_not_use_is_403(ask, tenant, upstream, logs):
    tenant.add_api_key(models=["gpt-4o-mini", "o3*"])
    response = ask(model="gpt-4o")
    assert error_of(response, 403, "permission_error", "model_not_allowed")["param"] == "model"
    assert assert_row(logs, response, "refused", "model_not_allowed")["model"] == "gpt-4o"
    assert upstream.requests == []


def test_each_model_of_a_request_must_be_allowed(ask, tenant):
    tenant.add_api_key(models=["gpt-4o"])
    assert ask(models=["gpt-5"]).json["error"]["code"] == "model_not_allowed"
    assert ask(models=["gpt-4o"]).status_code == 200


def test_a_workspace_without_provider_keys_serves_no_model(client, gateway, logs):
    tenant = new_tenant(gateway)
    response = client.post("/v1/chat/completions", json=CHAT, headers=tenant.headers)
    error = error_of(response, 404, "invalid_request_error", "model_not_found")
    assert "no enabled provider key" in error["message"]
    assert_row(logs, response, "refused", "model_not_found")


def test_a_provider_key_is_never_used_for_a_model_it_excludes(ask, gateway, tenant, upstream, logs):
    (key,) = gateway.database.save(lambda session: session.query(ProviderKey).all())
    tenant.change(ProviderKey, key.id, models=["gpt-4o-mini"])
    response = ask(model="openai/gpt-4o")
    error_of(response, 404, "invalid_request_error", "model_not_found")
    assert_row(logs, response, "refused", "model_not_found")
    assert upstream.requests == []


def test_what_an_invented_model_costs_is_no_counter_of_its_own(ask, counters, logs):
    for name in ("invented/a", "invented/b"):
        assert ask(model=name, models=None, stream="x").status_code == 400
    logs()
    assert [(c["model"], c["refused"]) for c in counters()] == [("", 2)]


# The order of the table.


def test_the_checks_come_in_the_order_of_the_contract(ask, client, gateway, tenant):
    tenant.add_api_key(models=["o3"])
    headers = {**tenant.headers, "Content-Encoding": "gzip"}

    def code(path="/v1/chat/completions", method="POST", headers=headers, body=b"{"):
        return client.open(path, method=method, headers=headers, data=body).json["error"]["code"]

    assert code("/v1/nothing", "PUT", {}) == "endpoint_not_supported"
    assert code(method="PUT", headers={}) == "method_not_allowed"
    assert code(headers={}) == "invalid_api_key"
    gateway.calls.is_draining = True
    assert code(body=b" " * (21 << 20)) == "shutting_down"
    gateway.calls.is_draining = False
    assert code(body=b" " * (21 << 20)) == "request_too_large"
    assert code() == "unsupported_encoding"
    assert code(headers=tenant.headers) == "invalid_json"
    assert ask(model="nobody's").json["error"]["code"] == "model_not_allowed"


# The database.


@contextmanager
def locked(gateway):
    """SQLite with a writer that does not let go."""
    gateway.database.transaction(lambda c: c.exec_driver_sql("pragma busy_timeout = 20"))
    other = sqlite3.connect(gateway.database.path, isolation_level=None)
    other.execute("begin immediate")
    yield
    other.execute("rollback")
    other.close()


@contextmanager
def full(gateway):
    """SQLite with not a page left."""
    gateway.database.transaction(lambda c: c.exec_driver_sql("pragma max_page_count = 1"))
    yield
    gateway.database.transaction(lambda c: c.exec_driver_sql("pragma max_page_count = 1000000"))


@contextmanager
def no_file(gateway):
    """SQLite whose file has gone."""
    path = gateway.database.path
    gateway.database.reader.dispose()
    away = path.with_suffix(".away")
    path.rename(away)
    path.mkdir()
    yield
    path.rmdir()
    away.rename(path)


@pytest.fixture
def impatient(monkeypatch):
    """Waits that take seconds are short, and a key once known stays known."""
    monkeypatch.setattr(ledger_module, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(ledger_module, "ADMISSION_SECONDS", 0.2)
    monkeypatch.setattr(access_module, "FRESH_SECONDS", 60.0)
    monkeypatch.setattr(access_module, "STALE_SECONDS", 60.0)


def assert_nothing_goes_out_while(away, code, retry_after, ask, gateway, upstream):
    """The first call may meet the failure after its upstream; none after it goes that far."""
    assert ask().status_code == 200
    with away(gateway):
        while (first := ask(user="x" * 500)).status_code == 200:
            pass  # the last page may still have room for a row
        sent = len(upstream.requests)
        second = ask(stream=True)
        assert len(upstream.requests) == sent
    for response in (first, second):
        error_of(response, 503, "server_error", code)
        assert response.headers["retry-after"] == retry_after


@on("sqlite")
def test_a_locked_database_is_unavailable(impatient, ask, gateway, upstream, logs):
    assert_nothing_goes_out_while(locked, "unavailable", "1", ask, gateway, upstream)
    assert logs()[2:] == []
    assert ask().status_code == 200


@on("sqlite")
def test_a_full_database_is_storage_full(impatient, ask, gateway, upstream, logs):
    assert_nothing_goes_out_while(full, "storage_full", "30", ask, gateway, upstream)
    assert "storage_full" in [row["error_code"] for row in logs()]
    assert ask().status_code == 200


@on("sqlite")
def test_a_key_that_cannot_be_looked_up_is_unavailable(ask, client, gateway, upstream, logs):
    with no_file(gateway):
        responses = [ask(), client.get("/v1/models", headers={"Authorization": unknown_key(None)})]
        assert client.get("/readyz").status_code == 503
    for response in responses:
        error_of(response, 503, "server_error", "unavailable")
        assert response.headers["retry-after"] == "1"
    assert (upstream.requests, logs()) == ([], [])


# Provider keys and destinations.


def only_provider_key(gateway):
    (key,) = gateway.database.save(lambda session: session.query(ProviderKey).all())
    return key


@STREAMS
def test_a_provider_key_that_does_not_open_is_503(ask, gateway, tenant, upstream, logs, is_stream):
    sealed = only_provider_key(gateway).sealed
    tenant.change(ProviderKey, only_provider_key(gateway).id, sealed=sealed[:-8] + "AAAAAAA=")
    response = ask(stream=is_stream)
    error_of(response, 503, "server_error", "provider_key_unreadable")
    assert int(response.headers["retry-after"]) > 0
    assert_row(logs, response, "error", "provider_key_unreadable")
    assert upstream.requests == []


def test_a_sealed_secret_opens_for_its_own_host_alone(ask, gateway, tenant, upstream):
    key = only_provider_key(gateway)
    tenant.change(ProviderKey, key.id, resolved_base_url=upstream.base_url.replace("127.0.0.1", "localhost"))
    assert ask().json["error"]["code"] == "provider_key_unreadable"
    assert upstream.requests == []


@STREAMS
@with_settings(upstream_allow_networks=())
def test_an_address_that_is_not_public_is_not_called(ask, upstream, logs, is_stream):
    response = ask(stream=is_stream)
    error_of(response, 502, "upstream_error", "destination_blocked")
    assert response.headers["x-should-retry"] == "false"
    row = assert_row(logs, response, "error", "destination_blocked")
    assert [attempt["error"]["code"] for attempt in row["attempts"]] == ["destination_blocked"]
    assert upstream.connections == 0


@STREAMS
def test_a_redirect_is_not_followed(ask, upstream, logs, is_stream):
    for count, code in enumerate((301, 302, 303, 307, 308), 1):
        upstream.reply = redirect(f"{upstream.base_url}/elsewhere", code)
        response = ask(stream=is_stream)
        error_of(response, 502, "upstream_error", "upstream_redirect")
        assert_row(logs, response, "error", "upstream_redirect")
        assert len(upstream.requests) == count


# What the upstream says.


@STREAMS
def test_a_refusal_keeps_the_words_of_the_upstream(ask, upstream, logs, is_stream):
    words = {"message": "context is full", "type": "their_type", "param": "messages", "code": "too_long"}
    for code in (400, 404, 413, 415, 422, 451):
        upstream.reply = status(code, {"error": words})
        response = ask(stream=is_stream)
        assert error_of(response, code, "their_type", "too_long") == words
        row = assert_row(logs, response, "error", "too_long")
        assert (row["attempts"][0]["http_status"], row["usage_source"]) == (code, None)


@STREAMS
def test_a_refused_provider_key_is_not_the_clients_fault(ask, upstream, logs, is_stream):
    for code in (401, 403):
        upstream.reply = status(code)
        response = ask(stream=is_stream)
        assert f"fake {code}" in error_of(response, 502, "upstream_error", "upstream_auth")["message"]
        assert response.headers["x-should-retry"] == "false"
        assert_row(logs, response, "error", "upstream_auth")


NO_MONEY = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}


@STREAMS
def test_our_own_lack_of_credit_is_upstream_quota(ask, upstream, logs, is_stream):
    for reply in (status(402), status(429, NO_MONEY)):
        upstream.reply = reply
        response = ask(stream=is_stream)
        error_of(response, 429, "insufficient_quota", "upstream_quota")
        assert response.headers["x-should-retry"] == "false"
        assert_row(logs, response, "error", "upstream_quota")


@STREAMS
def test_a_rate_limit_of_the_upstream_passes_its_retry_after(ask, upstream, logs, is_stream):
    upstream.reply = status(429, headers={"Retry-After": "7"})
    response = ask(stream=is_stream)
    error_of(response, 429, "rate_limit_error", "upstream_rate_limited")
    assert response.headers["retry-after"] == "7"
    assert "x-should-retry" not in response.headers
    assert_row(logs, response, "error", "upstream_rate_limited")


def test_a_rate_limit_that_names_no_time_forbids_retries(ask, upstream):
    upstream.reply = status(429)
    assert ask().headers["x-should-retry"] == "false"


BROKEN = {
    **{str(code): status(code) for code in (408, 409, 500, 501, 502, 503, 529)},
    "HTML": html(),
    "HTML 503": html(503),
    "empty": empty(),
    "204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "not JSON": status(200, b"{half"),
    "a list": status(200, b"[]"),
    "200 with an error": status(200, {"error": {"message": "boom"}}),
    "no choices": status(200, {"id": "x", "object": "chat.completion", "choices": []}),
    "not HTTP": raw(b"220 smtp ready\r\n\r\n"),
    "closed at once": raw(b""),
    "closed in the headers": raw(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    "reset at once": lambda exchange: exchange.reset(),
    "cut short": cut_after(20),
    "reset in the body": reset_after(20),
    "half a chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{"),
    "a nonsense chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
}


@STREAMS
def test_a_failing_upstream_is_502_and_not_to_be_retried(ask, upstream, logs, is_stream):
    for name, reply in BROKEN.items():
        upstream.close_connections()  # the next call begins on a new one, whose failure is final
        upstream.reply = reply
        response = ask(stream=is_stream)
        error_of(response, 502, "upstream_error", "upstream_error")
        assert response.headers["x-should-retry"] == "false", name
        assert "<" not in response.json["error"]["message"]
        assert assert_row(logs, response, "error", "upstream_error")["usage_source"] is None, name


def test_an_upstream_that_says_when_it_is_back_may_be_retried(ask, upstream):
    upstream.reply = status(503, headers={"Retry-After": "20"})
    headers = ask().headers
    assert (headers["retry-after"], headers.get("x-should-retry")) == ("20", None)


@STREAMS
def test_a_refused_connection_is_502(ask, upstream, logs, is_stream):
    upstream.close()
    response = ask(stream=is_stream)
    message = error_of(response, 502, "upstream_error", "upstream_error")["message"]
    assert message == "The upstream refused the connection."
    assert_row(logs, response, "error", "upstream_error")


def test_a_name_without_an_address_is_502(ask, tenant, logs):
    tenant.add_provider_key("http://no-such-host.invalid/v1", name="lost")
    response = ask(model="lost/x")
    message = error_of(response, 502, "upstream_error", "upstream_error")["message"]
    assert message == "The upstream's host name cannot be resolved."
    assert_row(logs, response, "error", "upstream_error")


SLOW = [
    ({"total_timeout": 0.2}, False, hang()),
    ({"total_timeout": 0.2}, False, headers_then_hang()),
    ({"total_timeout": 0.2}, True, hang()),
    ({"first_byte_timeout": 0.2}, True, hang()),
    ({"first_byte_timeout": 0.2}, True, headers_then_hang()),
]


@pytest.mark.parametrize(("changed", "is_stream", "reply"), SLOW)
def test_an_upstream_too_slow_is_504(ask, upstream, logs, is_stream, reply):
    upstream.reply = reply
    response = ask(stream=is_stream)
    error_of(response, 504, "upstream_error", "upstream_timeout")
    assert response.headers["x-should-retry"] == "false"
    assert_row(logs, response, "error", "upstream_timeout")
    upstream.wait_for_close(upstream.requests[0])


@with_settings(connect_timeout=0.2)
def test_a_host_that_does_not_answer_is_504(ask, tenant, logs):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        first.connect(full.getsockname())  # the queue takes one more than it says
        tenant.add_provider_key(f"http://127.0.0.1:{full.getsockname()[1]}/v1", name="deaf")
        response = ask(model="deaf/x")
    error_of(response, 504, "upstream_error", "upstream_timeout")
    assert_row(logs, response, "error", "upstream_timeout")


def test_a_bug_of_ours_is_500_in_the_same_shape_and_settled(ask, gateway, logs, monkeypatch):
    monkeypatch.setattr(gateway.upstream, "send", lambda *_: 1 / 0)
    response = ask()
    error_of(response, 500, "server_error", "internal_error")
    assert_row(logs, response, "error", "internal_error")


# The provider key's value.

ECHO = f"you sent Bearer {SECRET}"
WORDS = {"message": ECHO, "type": ECHO, "param": ECHO, "code": ECHO}
ECHOING_HEADERS = {"x-request-id": ECHO, "x-ratelimit-limit-requests": SECRET, "openai-version": SECRET}
ECHOED = [
    *(status(code, {"error": WORDS}) for code in (400, 401, 402, 429, 500)),
    status(500, ECHO.encode()),
    status(200, {"error": {"message": ECHO}}),
    status(200, {"error": ECHO}),
    status(200, ECHO.encode()),
    status(400, b"{}", ECHOING_HEADERS),
    status(429, b"{}", {"Retry-After": SECRET}),
    stream([b'event: error\ndata: {"message": "%s"}\n\n' % ECHO.encode()]),
    stream([event({"choices": [{"index": 0, "delta": {"content": "x"}}]}), event({"error": ECHO})]),
    redirect(f"https://example.com/?key={SECRET}"),
]


@STREAMS
@pytest.mark.parametrize(
    ("provider", "header", "value"),
    [("openai", "authorization", f"Bearer {SECRET}"), ("azure", "api-key", SECRET)],
)
def test_the_provider_keys_value_never_comes_back(
    ask, gateway, tenant, upstream, logs, is_stream, provider, header, value
):
    tenant.add_provider_key(upstream.base_url, SECRET, name="lab", provider=provider)
    for reply in ECHOED:
        upstream.reply = reply
        response = ask(model="lab/x", stream=is_stream)
        assert upstream.requests[-1].headers[header] == value
        assert SECRET not in response.get_data(as_text=True) + str(response.headers)
    assert SECRET not in str(logs())
    gateway.ledger.close()
    keys = gateway.database.save(lambda session: session.query(ProviderKey).all())
    assert SECRET not in str([key.last_error for key in keys])


# Nothing under /v1 is ever HTML.

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]
PATHS = [
    *("/v1", "/v1/", "/v1//", "//v1", "//v1/models", "/v1/..", "/v1/../", "/v1/../v1/models", "/v1/./models"),
    *("/v1/chat/completions", "/v1/chat/completions/", "/v1//chat/completions", "/v1/chat//completions"),
    *("/v1/embeddings", "/v1/models", "/v1/models/", "/v1/models/a/b", "/v1/models//a", "/v1/MODELS", "/V1"),
    *("/v1/responses/x", "/v1/\x00", "/v1/\xff", "/v1/models/\xff", "/v1/\n", "/v1/<script>", "/v1/%2e%2e"),
    *("/v1/models/\x00", "/v1/models/a\nb", "/v1/" + "a" * 5000, "/v1/;x", "/v1?x"),
]


def test_nothing_under_v1_is_ever_html(client, tenant):
    for method, path, headers in itertools.product(METHODS, PATHS, ({}, tenant.headers)):
        response = client.open(
            "/",
            method=method,
            headers={**headers, "Accept": "text/html"},
            environ_overrides={"PATH_INFO": path},
        )
        place = (method, path, response.status_code)
        assert "html" not in response.headers.get("Content-Type", ""), place
        assert response.headers["x-request-id"].startswith("req_"), place
        assert response.status_code not in (301, 302, 307, 308, 500), place
        if response.status_code >= 400 and method != "HEAD":
            assert set(response.json["error"]) == {"message", "type", "param", "code"}, place


def test_an_unknown_path_is_404_whatever_the_method(client):
    assert {client.open("/v1/nothing", method=method).status_code for method in METHODS[:7]} == {404}


def test_a_browser_may_ask_before_it_calls(client, changed):
    response = client.options("/v1/chat/completions", headers={"Origin": "https://elsewhere.example"})
    assert response.status_code == 204
    assert "access-control-allow-methods" not in response.headers


@with_settings(cors_origins=frozenset({"https://app.example"}))
def test_an_origin_that_is_listed_may_call_from_a_browser(ask, client):
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    before = client.options("/v1/chat/completions", headers=asked).headers
    assert before["access-control-allow-origin"] == "https://app.example"
    assert "POST" in before["access-control-allow-methods"]
    assert ask(headers=asked).headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in before
    assert "access-control-allow-origin" not in ask(headers={"Origin": "https://evil.example"}).headers
