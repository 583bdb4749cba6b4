import itertools
import json
import socket

import pytest
import requests

from perpetuo.config import load
from perpetuo.gateway import access as access_module
from perpetuo.gateway import ledger as ledger_module
from tests import postgres
from tests.conftest import BACKENDS, migrate
from tests.fault_proxy import FaultProxy
from tests.house import CHAT, House, house, new_database  # noqa: F401
from tests.serving import wait_until

TARGETS = [
    *("/v1", "//v1/models", "/v1/../v1/nothing", "/v1/%2e%2e/x", "/v1/%00", "/v1/%ff", "/v1/%zz", "/v1/%"),
    *("/v1/%0d%0aX:%20y", "http://elsewhere/v1/nothing", "/v1/#x", "/v1/?a=%ff", "/v1/models/%2F%2f"),
]


def test_odd_targets_get_json(house):  # noqa: F811
    for target, method in itertools.product(TARGETS, ("GET", "POST", "HEAD", "OPTIONS")):
        request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        head, _, body = house.raw(request.encode()).partition(b"\r\n\r\n")
        assert b"html" not in head.lower() + body.lower(), head
        assert head.split()[1][:1] in (b"2", b"4"), head
        assert b" 204 " in head or method == "HEAD" or json.loads(body)["error"]["code"], head


@pytest.fixture(scope="module")
def small_house(request, tmp_path_factory):
    """A server that takes bodies of two thousand bytes."""
    folder = tmp_path_factory.mktemp("small")
    url = new_database(request, BACKENDS[-1], folder)
    with House(url, folder, PERPETUO_MAX_BODY_BYTES="2000") as built:
        yield built


def post(house, tenant, body):  # noqa: F811
    """Chunked where the body is an iterator."""
    url = f"{house.server.url}/v1/chat/completions"
    return requests.post(url, data=body, headers=tenant.headers, timeout=10)


def test_a_chunked_body_is_read_whole(small_house, upstream):
    tenant, body = small_house.tenant(upstream), json.dumps(CHAT).encode()
    assert post(small_house, tenant, iter([body[:7], body[7:]])).status_code == 200
    assert upstream.requests[0].body == body
    assert small_house.settled(tenant)[0]["status"] == "ok"


def in_chunks(body):
    return iter([body[:1000], body[1000:]])


@pytest.mark.parametrize("size", [2001, 2_000_000])
@pytest.mark.parametrize("framed", [bytes, in_chunks])
def test_a_body_too_large_is_413_however_it_comes(small_house, upstream, size, framed):
    tenant = small_house.tenant(upstream)
    answer = post(small_house, tenant, framed(b"x" * size))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    (row,) = small_house.settled(tenant)
    assert (row["status"], row["error_code"], row["http_status"]) == ("refused", "request_too_large", 413)
    assert upstream.requests == []


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 900"])
def test_a_body_that_breaks_off_reaches_no_upstream(small_house, upstream, framing):
    tenant = small_house.tenant(upstream)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tenant.key}\r\n"
    with socket.create_connection(("127.0.0.1", small_house.server.port), timeout=10) as connection:
        connection.sendall(f"{head}{framing}\r\n\r\n".encode() + b'10\r\n{"model"')
    (row,) = small_house.settled(tenant)
    assert (row["status"], upstream.requests) == ("refused", [])


# PostgreSQL behind a proxy that fails.

needs_postgresql = pytest.mark.skipif("postgresql" not in BACKENDS, reason="left out of this run")


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory):
    server = postgres.start(tcp=True)
    migrate(server.create_database("distant"), tmp_path_factory.mktemp("distant"))
    yield server
    server.stop()


@pytest.fixture
def distant(tcp_server):
    """A PostgreSQL with a proxy in front of it: the proxy, and the URL that leads through it."""
    with FaultProxy(tcp_server.address) as proxy:
        yield proxy, tcp_server.tcp_url("distant", proxy.address)


@pytest.fixture
def settings(distant, tmp_path):
    return load({"DATABASE_URL": distant[1], "PERPETUO_DATA": str(tmp_path), "PERPETUO_ORPHAN_GRACE": "0"})


@needs_postgresql
def test_nothing_goes_out_once_the_database_is_known_to_be_away(distant, ask, upstream, logs, monkeypatch):
    monkeypatch.setattr(ledger_module, "SETTLE_SECONDS", 0.3)
    for name in ("FRESH_SECONDS", "STALE_SECONDS"):  # the key stays known
        monkeypatch.setattr(access_module, name, 60.0)
    proxy, _ = distant
    assert ask().status_code == 200
    proxy.refuse = True
    proxy.cut()
    answers = [ask()]  # may still go out, and meets the failure at its end
    sent = len(upstream.requests)
    answers += [ask(), ask(stream=True)]
    assert len(upstream.requests) == sent
    for answer in answers:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json["error"]["code"] == "unavailable"
    proxy.refuse = False
    assert not [row for row in logs() if row["status"] in ("refused", "open")]


@needs_postgresql
def test_a_key_is_not_waited_for_while_the_database_is_silent(distant, tmp_path, upstream):
    proxy, url = distant
    with House(url, tmp_path) as built:
        tenant = built.tenant(upstream)
        assert built.post(tenant).status_code == 200
        stranger = built.tenant(upstream)  # whose key this process does not know yet
        proxy.silent = True
        answers = [built.post(stranger), requests.get(f"{built.server.url}/readyz", timeout=5)]
        assert requests.get(f"{built.server.url}/healthz", timeout=5).status_code == 200
        proxy.silent = False
        wait_until(lambda: built.post(stranger).status_code == 200)
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert answer.headers["retry-after"] == "1"
        assert {row["status"] for row in built.settled(stranger)} == {"ok"}
