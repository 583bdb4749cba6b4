import json
import signal
import threading

import pytest
import requests

from tests.conftest import BACKENDS
from tests.fake_upstream import completion, hang, headers_then_hang, stall_after, stream
from tests.house import House, Visitor, house, new_database  # noqa: F401
from tests.serving import wait_until

SOON = 1.0  # what the contract promises: a client that leaves ends the upstream call within a second
TALKING = stream(text="word " * 2000, delay=0.01)
FINISHED = 4  # events of the fake stream up to its finish chunk: role, two words, finish


@pytest.fixture
def tenant(house, upstream):  # noqa: F811
    return house.tenant(upstream)


@pytest.fixture(params=[False, True], ids=["FIN", "RST"])
def with_reset(request):
    return request.param


def leave_and_be_noticed(visitor, upstream, with_reset):
    visitor.leave(with_reset=with_reset)
    upstream.wait_for_close(upstream.requests[0], SOON)


@pytest.mark.parametrize("fields", [{"stream": True}, {}], ids=["stream", "plain"])
def test_leaving_before_the_headers_ends_the_call(house, tenant, upstream, fields, with_reset):  # noqa: F811
    upstream.reply = hang()
    visitor = Visitor(house, tenant, **fields)
    upstream.wait_for_requests(1)
    leave_and_be_noticed(visitor, upstream, with_reset)
    (row,) = house.settled(tenant)
    assert (row["status"], row["error_code"], row["cost_nano"]) == ("client_closed", None, 0)


def test_leaving_before_the_first_content_ends_the_call(house, tenant, upstream, with_reset):  # noqa: F811
    upstream.reply = headers_then_hang()
    visitor = Visitor(house, tenant, stream=True)
    upstream.wait_for_requests(1)
    leave_and_be_noticed(visitor, upstream, with_reset)
    assert house.settled(tenant)[0]["status"] == "client_closed"


@pytest.mark.parametrize("reply", [stall_after(3), TALKING], ids=["silent", "talking"])
def test_leaving_in_the_middle_of_a_stream_ends_it(house, tenant, upstream, reply, with_reset):  # noqa: F811
    upstream.reply = reply
    visitor = Visitor(house, tenant, stream=True)
    visitor.read_until(b'"content"')
    leave_and_be_noticed(visitor, upstream, with_reset)
    (row,) = house.settled(tenant)
    assert (row["status"], row["http_status"], row["usage_source"]) == ("client_closed", 200, "estimate")
    assert row["completion_tokens"] > 0


def test_leaving_in_the_middle_of_a_plain_answer_ends_the_call(house, tenant, upstream, with_reset):  # noqa: F811
    upstream.reply = stall_after(0, completion())
    visitor = Visitor(house, tenant)
    upstream.wait_for_requests(1)
    leave_and_be_noticed(visitor, upstream, with_reset)
    assert house.settled(tenant)[0]["status"] == "client_closed"


def test_a_client_that_closes_only_its_own_half_counts_as_gone(house, tenant, upstream):  # noqa: F811
    upstream.reply = stall_after(3)
    visitor = Visitor(house, tenant, stream=True)
    visitor.read_until(b'"content"')
    visitor.socket.shutdown(1)
    upstream.wait_for_close(upstream.requests[0], SOON)
    visitor.leave()
    assert house.settled(tenant)[0]["status"] == "client_closed"


def test_leaving_after_the_finish_reason_is_no_loss(house, tenant, upstream, with_reset):  # noqa: F811
    upstream.reply = stall_after(FINISHED)
    visitor = Visitor(house, tenant, stream=True)
    visitor.read_until(b'"finish_reason":"stop"')
    visitor.leave(with_reset=with_reset)
    (row,) = house.settled(tenant)
    assert (row["status"], row["http_status"]) == ("ok", 200)


def test_leaving_after_done_is_no_loss(house, tenant, upstream, with_reset):  # noqa: F811
    upstream.reply = stall_after(6)
    visitor = Visitor(house, tenant, stream=True)
    visitor.read_until(b"[DONE]")
    visitor.leave(with_reset=with_reset)
    (row,) = house.settled(tenant)
    assert (row["status"], row["usage_source"]) == ("ok", "provider")


def test_a_settled_row_is_there_before_done(house, tenant, upstream):  # noqa: F811
    visitor = Visitor(house, tenant, stream=True)
    visitor.read_until(b"[DONE]")
    assert [row["status"] for row in house.rows(tenant)] == ["ok"]
    visitor.leave()


def test_a_row_is_there_before_the_first_byte_of_a_stream(house, tenant, upstream):  # noqa: F811
    upstream.reply = stall_after(3)
    visitor = Visitor(house, tenant, stream=True)
    visitor.read_until(b"HTTP/1.1 200")
    assert [row["status"] for row in house.rows(tenant)] == ["open"]
    visitor.leave()
    house.settled(tenant)


def test_a_pipelined_request_does_not_look_like_leaving(house, tenant, upstream):  # noqa: F811
    upstream.reply = stream(first_delay=0.2)
    visitor = Visitor(house, tenant, stream=True)
    visitor.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    visitor.read_until(b'{"status":"ok"}')
    visitor.leave()
    assert b"[DONE]" in visitor.received
    assert house.settled(tenant)[0]["status"] == "ok"


def test_fifty_streams_at_once_all_end_well(house, tenant, upstream):  # noqa: F811
    upstream.reply = stream(text="one two three four five", delay=0.02)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(house.post(tenant, stream=True).text))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer[-14:] for answer in answers] == ["data: [DONE]\n\n"] * 50
    assert [row["status"] for row in house.settled(tenant, 50)] == ["ok"] * 50


class Stopping:
    """A server of its own with one stream on it that a SIGTERM meets."""

    def __init__(self, house, upstream, tenant):  # noqa: F811
        self.house, self.upstream, self.tenant = house, upstream, tenant

    def begin(self, reply):
        self.upstream.reply = reply
        visitor = Visitor(self.house, self.tenant, stream=True)
        visitor.read_until(b'"content"')
        return visitor

    def is_turning_away(self):
        """Whether a call that comes now is refused, be it by us or since nobody listens any more."""
        try:
            return self.house.post(self.tenant, model=None).json()["error"]["code"] == "shutting_down"
        except requests.ConnectionError:
            return True


@pytest.fixture(params=BACKENDS)
def stopping(request, tmp_path, upstream):
    """A server that drains for a second."""
    url = new_database(request, request.param, tmp_path)
    with House(url, tmp_path, PERPETUO_DRAIN_TIMEOUT="1") as built:
        yield Stopping(built, upstream, built.tenant(upstream))


def error_events(received):
    events = [line[6:] for line in received.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(event)["error"] for event in events if "error" in json.loads(event)]


def test_a_stream_that_ends_within_the_drain_ends_well(stopping):
    visitor = stopping.begin(stream(text="one two three four five six seven", delay=0.08))
    stopping.house.server.signal(signal.SIGTERM)
    visitor.read_until(b"[DONE]")
    visitor.leave()
    assert stopping.house.server.process.wait(15) == 0
    assert [row["status"] for row in stopping.house.settled(stopping.tenant)] == ["ok"]


def test_a_stream_longer_than_the_drain_is_ended_with_an_error_and_settled(stopping):
    visitor = stopping.begin(TALKING)
    stopping.house.server.signal(signal.SIGTERM)
    wait_until(stopping.is_turning_away)
    visitor.read_until(b"0\r\n\r\n")
    visitor.leave()
    assert stopping.house.server.process.wait(15) == 0
    assert [error["code"] for error in error_events(visitor.received)] == ["shutting_down"]
    assert b"[DONE]" not in visitor.received
    row = stopping.house.settled(stopping.tenant)[0]
    assert (row["status"], row["error_code"], row["http_status"]) == ("error", "shutting_down", 200)
    assert row["usage_source"] == "estimate"


def test_a_plain_call_longer_than_the_drain_is_refused_and_settled(stopping):
    stopping.upstream.reply = hang()
    visitor = Visitor(stopping.house, stopping.tenant)
    stopping.upstream.wait_for_requests(1)
    stopping.house.server.signal(signal.SIGTERM)
    answer = visitor.read_until(b"}}")
    visitor.leave()
    assert stopping.house.server.process.wait(15) == 0
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"shutting_down"' in answer
    assert stopping.house.settled(stopping.tenant)[0]["error_code"] == "shutting_down"
