import dataclasses
import fcntl
import json
import os
from contextlib import closing

import pytest
import requests
import sqlalchemy as sa

from perpetuo import engines
from perpetuo.db import Database
from perpetuo.gateway.ledger import ADMISSION_SECONDS, SETTLE_SECONDS
from perpetuo.models import Workspace
from tests import postgres
from tests.balance import books_balance
from tests.conftest import BACKENDS
from tests.fake_upstream import (
    LoopbackServer,
    completion,
    event,
    hang,
    raw,
    stall_after,
    status,
    stream,
)
from tests.gateway.test_chat import text_of
from tests.house import CHAT, House, Visitor, house, new_database  # noqa: F401
from tests.serving import wait_until

needs_postgresql = pytest.mark.skipif("postgresql" not in BACKENDS, reason="about PostgreSQL")
needs_sqlite = pytest.mark.skipif("sqlite" not in BACKENDS, reason="about SQLite")


# Time-outs, and what upstreams and clients write.


@pytest.fixture
def settings(settings):
    return dataclasses.replace(settings, first_byte_timeout=0.3, total_timeout=5.0)


def test_the_first_byte_is_not_waited_for_longer_after_a_stale_connection(ask, upstream, logs):
    upstream.script([completion(), lambda exchange: exchange.close(), *[hang()] * 3])
    assert ask().status_code == 200
    response = ask(stream=True)
    assert (response.status_code, response.json["error"]["code"]) == (504, "upstream_timeout")
    assert response.json["error"]["message"] == "The upstream did not begin its answer in time."
    assert [request.connection_id for request in upstream.requests] == [1, 1, 2, 3, 4]
    attempts = logs()[-1]["attempts"]
    assert len(attempts) == 4
    assert all(attempt["duration_ms"] < 1000 for attempt in attempts)


MODELS = {"surrogate": "gpt-4o\ud800", "NUL": "gpt-4o\0"}
CHUNKS = [
    {"id": "c", "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]},
    {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_that_no_database_holds_is_asked_for_all_the_same(ask, upstream, logs, model):
    upstream.reply = completion("Hi", model="gpt-4o")
    assert ask(model=model).json["choices"][0]["message"]["content"] == "Hi"
    upstream.reply = stream(pieces=[*map(event, CHUNKS), b"data: [DONE]\n\n"])
    assert text_of(ask(model=model, stream=True)) == "Hi"
    assert [request.json["model"] for request in upstream.requests] == [model] * 2
    rows = logs()
    assert [row["status"] for row in rows] == ["ok"] * 2
    assert [len(row["attempts"]) for row in rows] == [1, 1]


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_that_no_database_holds_has_its_refusal_from_the_upstream(
    ask, upstream, logs, model, is_stream
):
    words = json.dumps({"error": {"message": f"no {model}", "type": "t", "code": "model_not_found"}})
    upstream.reply = status(404, words.encode())
    response = ask(model=model, stream=is_stream)
    assert (response.status_code, response.json["error"]["code"]) == (404, "model_not_found")
    (row,) = logs()
    assert (row["status"], row["http_status"]) == ("error", 404)
    assert [attempt["http_status"] for attempt in row["attempts"]] == [404]


def test_a_header_that_no_header_can_be_does_not_harm_the_answer(house, upstream):  # noqa: F811
    body = json.dumps({"choices": [{"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop"}]})
    head = "HTTP/1.1 200 OK\r\nx-ratelimit-foo(bar): 1\r\nx-ratelimit-limit-requests: 60\r\n"
    upstream.reply = raw(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    tenant = house.tenant(upstream)
    response = house.post(tenant)
    assert (response.status_code, response.json()["choices"][0]["message"]["content"]) == (200, "Hi")
    assert response.headers["x-ratelimit-limit-requests"] == "60"
    assert "x-ratelimit-foo(bar)" not in response.headers
    assert house.settled(tenant)[0]["status"] == "ok"


class Narrow(LoopbackServer):
    """Answers small requests, and 413 to the head of a large one, whose body it leaves unread."""

    @property
    def base_url(self):
        return f"http://{self.host}:{self.port}/v1"

    def serve(self, connection, number):
        with connection.makefile("rb") as reader:
            while head := b"".join(iter(reader.readline, b"\r\n")).lower():
                length = int(head.partition(b"content-length:")[2].split()[0])
                if length > 100_000:
                    connection.sendall(answer(413, {"error": {"message": "too large", "type": "t"}}))
                    return
                reader.read(length)
                choice = {"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop"}
                connection.sendall(answer(200, {"choices": [choice]}))


def answer(code, value):
    body = json.dumps(value).encode()
    return f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("is_reused", [False, True], ids=["fresh", "reused"])
def test_a_413_before_the_body_is_sent_reaches_the_client(house, is_reused, is_stream):  # noqa: F811
    with Narrow() as narrow:
        tenant = house.tenant(narrow)
        if is_reused:
            assert house.post(tenant).status_code == 200
        messages = [{"role": "user", "content": "x" * 5_000_000}]
        response = house.post(tenant, messages=messages, stream=is_stream)
        assert (response.status_code, response.json()["error"]["message"]) == (413, "too large")
        assert house.settled(tenant, 1 + is_reused)[-1]["http_status"] == 413


# A database that does not take writes.


def is_refused_unsent(house, tenant, upstream):  # noqa: F811
    """Whether a call is refused by admission, within a second, not by its settle, within ten."""
    before = len(upstream.requests)
    response = house.post(tenant)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    is_quick = response.elapsed.total_seconds() < (ADMISSION_SECONDS + SETTLE_SECONDS) / 2
    return is_quick and len(upstream.requests) == before


def is_noticed(house, tenant):  # noqa: F811
    """Whether a call is refused. One sent before the server noticed would wait for its settle: it leaves."""
    try:
        url = f"{house.server.url}/v1/chat/completions"
        return requests.post(url, json=CHAT, headers=tenant.headers, timeout=3).status_code == 503
    except requests.Timeout:
        return False


def all_is_well_again(house, tenant):  # noqa: F811
    """The rows, all settled, once calls are served again."""
    wait_until(lambda: house.post(tenant).status_code == 200, explain=lambda: house.server.log)
    rows = house.settled(tenant)
    assert rows[-1]["status"] == "ok"
    books_balance(house.gateway.database)
    return rows


class Switch:
    """Makes a database read-only and writable again, for every session."""

    def __init__(self, url):
        self.url = url

    def set(self, *, read_only):
        name = postgres.sql.Identifier(sa.make_url(self.url).database)
        value = postgres.sql.SQL("on" if read_only else "off")
        change = postgres.sql.SQL("alter database {} set default_transaction_read_only = {}")
        others = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        with closing(postgres.connect(self.url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("set default_transaction_read_only = off")
                cursor.execute(change.format(name, value))
                cursor.execute(f"{others} and pid <> pg_backend_pid()")


@needs_postgresql
def test_a_read_only_postgresql_refuses_calls_and_loses_none(request, tmp_path, upstream):
    url = new_database(request, "postgresql", tmp_path)
    with House(url, tmp_path) as built:
        tenant = built.tenant(upstream)
        assert built.post(tenant).status_code == 200
        upstream.script([stall_after(3)])
        visitor = Visitor(built, tenant, stream=True)
        visitor.read_until(b'"content"')
        Switch(url).set(read_only=True)
        visitor.leave()
        upstream.wait_for_close(upstream.requests[1])
        wait_until(lambda: is_noticed(built, tenant))
        assert all(is_refused_unsent(built, tenant, upstream) for _ in range(2))
        Switch(url).set(read_only=False)
        rows = all_is_well_again(built, tenant)
        assert [row["status"] for row in rows if row["stream"]] == ["client_closed"]


@needs_sqlite
def test_a_sqlite_that_another_process_holds_refuses_calls_and_loses_none(request, tmp_path, upstream):
    with House(new_database(request, "sqlite", tmp_path), tmp_path) as built:
        tenant = built.tenant(upstream)
        assert built.post(tenant).status_code == 200
        handle = os.open(f"{built.gateway.database.path}.writer", os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            unlogged = built.post(tenant)  # its answer was there, its row was not
            assert (unlogged.status_code, unlogged.json()["error"]["code"]) == (503, "unavailable")
            assert all(is_refused_unsent(built, tenant, upstream) for _ in range(2))
        finally:
            os.close(handle)
        rows = all_is_well_again(built, tenant)
        (row,) = [row for row in rows if row["id"] == unlogged.headers["x-request-id"]]
        assert (row["status"], row["http_status"], row["error_code"]) == ("error", 503, "unavailable")


TOUCH = sa.update(Workspace).values(config_version=Workspace.config_version + 1)


ON_POSTGRESQL = pytest.mark.parametrize(
    "database_url", [name for name in BACKENDS if name == "postgresql"], indirect=True
)


@pytest.fixture
def frozen(gateway, monkeypatch):
    """A connection of our own engine in a transaction that locks a workspace, and says nothing more."""
    monkeypatch.setattr(engines, "IDLE_MS", 300)
    database = Database(gateway.database.url)
    connection = database.writer.connect()
    yield connection
    connection.close()
    database.close()


@ON_POSTGRESQL
def test_a_process_frozen_in_a_transaction_loses_its_locks(frozen, gateway, tenant):
    frozen.execute(TOUCH)
    assert gateway.database.transaction(lambda c: c.execute(TOUCH).rowcount) == 1
    with pytest.raises(sa.exc.DBAPIError):
        frozen.execute(TOUCH)


@ON_POSTGRESQL
def test_that_takes_five_seconds(gateway):
    show = "show idle_in_transaction_session_timeout"
    assert gateway.database.transaction(lambda c: c.exec_driver_sql(show).scalar()) == "5s"
