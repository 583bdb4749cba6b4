import json
import signal
import socket
import time
from contextlib import closing
from functools import partial

import psutil
import pytest
import requests

from tests.books import add_logs
from tests.conftest import BACKENDS
from tests.fake_upstream import completion, event, stall_after
from tests.house import House, Visitor, new_database
from tests.people import PASSWORD
from tests.serving import wait_until
from tests.slow_clients import HASTY, Crowd, chat, complaints, dripping, head

IDLE_SECONDS = 1
CHUNK = event(
    {"id": "c", "choices": [{"index": 0, "delta": {"content": "x" * 64_000}, "finish_reason": None}]}
)
END = (
    event({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
)
LARGE = 250  # chunks: four times what the buffers between server and client hold


def endless(exchange):
    exchange.start(200, {"Content-Type": "text/event-stream"})
    while True:
        exchange.write(CHUNK)


def large(exchange):
    exchange.start(200, {"Content-Type": "text/event-stream"})
    for _ in range(LARGE):
        exchange.write(CHUNK)
    exchange.write(END, last=True)


@pytest.fixture
def hasty(request, tmp_path):
    """A server whose calls may last two seconds, and four of them at a time, two for each workspace."""
    url = new_database(request, getattr(request, "param", BACKENDS[0]), tmp_path)
    with House(url, tmp_path, PERPETUO_TOTAL_TIMEOUT="2", PERPETUO_MAX_IN_FLIGHT="4") as built:
        yield built


@pytest.fixture
def patient(request, tmp_path):
    """A server that waits for a silent upstream for a second only."""
    url = new_database(request, BACKENDS[0], tmp_path)
    with House(url, tmp_path, PERPETUO_IDLE_TIMEOUT=str(IDLE_SECONDS)) as built:
        yield built


def upload(house, tenant, begun):
    """A connection on which the server has read a request's head, and these bytes of its body."""
    connection = socket.create_connection(("127.0.0.1", house.server.port), timeout=15)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tenant.key}\r\n"
    connection.sendall(head.encode() + b"Expect: 100-continue\r\n" + begun)
    assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return connection


@pytest.mark.parametrize("hasty", BACKENDS, indirect=True)
def test_a_client_that_reads_no_more_is_ended_by_the_total_time(hasty, upstream):
    upstream.reply = endless
    tenant = hasty.tenant(upstream)
    visitor = Visitor(hasty, tenant, stream=True)
    visitor.read_until(b'"content"')
    upstream.wait_for_close(upstream.requests[0])
    (row,) = hasty.settled(tenant)
    assert row["status"] in ("client_closed", "error")
    assert (row["http_status"], row["usage_source"]) == (200, "estimate")
    hasty.server.signal(signal.SIGTERM)
    assert hasty.server.process.wait(10) == 0  # less than the drain, which waits for calls in flight
    visitor.leave()


STALLED = (b"Content-Length: 500\r\n\r\n{", b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n')


def test_a_stalled_upload_loses_its_place(hasty, upstream):
    tenant = hasty.tenant(upstream)
    assert hasty.post(tenant).status_code == 200  # from now on its key is known without the database
    with upload(hasty, tenant, STALLED[0]) as first, upload(hasty, tenant, STALLED[1]) as second:
        assert hasty.post(tenant).json()["error"]["code"] == "overloaded"
        assert hasty.post(hasty.tenant(upstream)).status_code == 200
        answers = [b"".join(iter(partial(stalled.recv, 65536), b"")) for stalled in (first, second)]
    assert [answer[:13] for answer in answers] == [b"HTTP/1.1 408 "] * 2
    assert all(b'"code":"request_timeout"' in answer for answer in answers)
    assert [hasty.post(tenant).status_code for _ in range(2)] == [200, 200]


def test_a_slow_client_that_lives_gets_its_whole_answer(patient, upstream):
    upstream.reply = large
    tenant = patient.tenant(upstream)
    visitor = Visitor(patient, tenant, stream=True)
    visitor.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    received, pauses = visitor.read_until(b'"content"'), [0, 5_000_000]
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        if pauses and len(received) > pauses[0]:
            pauses.pop(0)
            time.sleep(1.3 * IDLE_SECONDS)  # the upstream does not fall silent meanwhile: it is held up
        piece = visitor.socket.recv(1 << 20)
        assert piece, received[-300:]
        received += piece
    visitor.leave()
    assert b'"error"' not in received
    assert received.count(b'"content"') == LARGE
    assert patient.settled(tenant)[0]["status"] == "ok"


@pytest.fixture(scope="module")
def brisk(request, tmp_path_factory):
    """A server that gives a client a second and a half for a body, and for the next piece of an answer."""
    folder = tmp_path_factory.mktemp("brisk")
    url = new_database(request, BACKENDS[0], folder)
    with House(url, folder, HASTY_SECONDS="1.5", PERPETUO_TOTAL_TIMEOUT="20", **HASTY) as built:
        yield built
        assert not complaints(built)


@pytest.fixture
def open_files(brisk):
    """Afterwards as many descriptors are open as before."""
    (worker,) = [psutil.Process(pid) for pid in brisk.server.workers()]
    before = worker.num_fds()
    yield
    wait_until(lambda: worker.num_fds() <= before + 6, explain=lambda: f"{before}, {worker.num_fds()}")


class Account:
    """Someone with a workspace and an access token."""

    def __init__(self, house, email):
        account = {"email": email, "password": PASSWORD}
        self.url = house.server.url
        self.house = house
        answer = requests.post(f"{self.url}/auth/signup", json=account, timeout=10).json()
        self.token, self.workspace = answer["token"], answer["workspace"]["id"]

    def get(self, path):
        return head(f"/workspaces/{self.workspace}/{path}", self.token).replace(b"POST", b"GET", 1)


def of_a_stream(house, upstream):
    upstream.reply = endless
    return chat(house.tenant(upstream), stream=True)


def of_a_completion(house, upstream):
    upstream.reply = completion(text="x" * 2_000_000)
    return chat(house.tenant(upstream))


def of_models(house, upstream):
    tenant = house.tenant(upstream)
    tenant.add_provider_key(upstream.base_url, models=[f"{n:0>200}" for n in range(500)])
    return head("/v1/models", tenant.key).replace(b"POST", b"GET", 1) * 5


def of_an_export(house, upstream):
    account = Account(house, "export@example.com")
    add_logs(house.gateway, account.workspace, [{"preview_answer": "x" * 200}] * 1200)
    return account.get("logs.jsonl")


def of_a_page_of_logs(house, upstream):
    account = Account(house, "page@example.com")
    add_logs(house.gateway, account.workspace, [{"preview_answer": "x" * 200}] * 200)
    return account.get("logs?limit=200") * 4


def of_refusals(house, upstream):
    return b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000


ANSWERS = [of_a_stream, of_a_completion, of_models, of_an_export, of_a_page_of_logs, of_refusals]


@pytest.mark.parametrize("opening", ANSWERS)
def test_a_client_that_reads_nothing_is_let_go(brisk, upstream, open_files, opening):
    with closing(Crowd(brisk.server.port, 3, opening(brisk, upstream))) as crowd:
        wait_until(crowd.are_gone)


def broken_off(brisk, sent):
    """The answer to these bytes of a request whose body never comes to its end."""
    with socket.create_connection(("127.0.0.1", brisk.server.port), timeout=10) as connection:
        connection.sendall(sent)
        return b"".join(iter(partial(connection.recv, 65536), b""))


LOGIN = head("/auth/login", Content_Length=500) + b"{"
CHUNKS = head("/auth/login", Transfer_Encoding="chunked")
FORM = head("/auth/login", Content_Length=500).replace(b"json", b"x-www-form-urlencoded") + b"email="


@pytest.mark.parametrize("sent", [LOGIN, FORM, CHUNKS + b'5\r\n{"ema\r\n'], ids=["json", "form", "chunks"])
def test_a_management_body_that_does_not_come_gets_408(brisk, open_files, sent):
    answer = broken_off(brisk, sent)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_one_that_comes_byte_by_byte_gets_408_too(brisk, open_files):
    with closing(Crowd(brisk.server.port, 3, LOGIN)) as crowd, dripping(crowd):
        wait_until(crowd.are_gone)
        assert [member.recv(13) for member in crowd.sockets] == [b"HTTP/1.1 408 "] * 3


def test_a_body_of_broken_chunks_gets_400(brisk, upstream, open_files):
    tenant = brisk.tenant(upstream)
    for path in ("/auth/login", "/v1/chat/completions"):
        sent = head(path, tenant.key, Transfer_Encoding="chunked") + b"zz\r\n{}\r\n0\r\n\r\n"
        assert broken_off(brisk, sent).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [LOGIN, CHUNKS + b"5\r\n{"], ids=["length", "chunks"])
def test_a_client_that_leaves_within_its_body_is_no_fault_of_ours(brisk, open_files, sent):
    Crowd(brisk.server.port, 3, sent).reset()
    Crowd(brisk.server.port, 3, sent).close()


@pytest.mark.parametrize("with_reset", [False, True], ids=["FIN", "RST"])
def test_a_client_that_leaves_behind_a_pipelined_request_is_noticed(brisk, upstream, open_files, with_reset):
    upstream.reply = stall_after(3)
    tenant = brisk.tenant(upstream)
    visitor = Visitor(brisk, tenant, stream=True)
    visitor.read_until(b'"content"')
    visitor.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    visitor.leave(with_reset=with_reset)
    upstream.wait_for_close(upstream.requests[0], 2.0)
    wait_until(lambda: [row["status"] for row in brisk.rows(tenant)] == ["client_closed"])
