import signal
import socket
import time
from functools import partial

import pytest

from tests.conftest import BACKENDS
from tests.fake_upstream import event
from tests.house import House, Visitor, new_database

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
