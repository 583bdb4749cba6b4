"""Faults of upstreams under the real server, where one call that never waits would stop all others."""

import gzip
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import BACKENDS
from tests.fake_upstream import FakeUpstream, completion, event, stream
from tests.fault_upstream import (
    CHUNKED,
    ENDLESS,
    LAST,
    LATE,
    LATE_SILENT,
    MIB,
    OK,
    SILENT,
    WORDS,
    Endless,
    FaultUpstream,
    chunk,
    packed,
)
from tests.house import House, new_database
from tests.serving import wait_until
from tests.slow_clients import HASTY
from tests.tenants import new_tenant

STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
MOST_SENT_BYTES = 90 * MIB  # the largest answer there may be, and what lies in buffers
MOST_GROWTH_BYTES = 100 * MIB
BOMB_GROWTH_BYTES = 160 * MIB  # an answer of 60 MiB in pieces and then in one; parsed it would be 1.4 GiB
DRIPS = {
    "100s": Endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", chunked=False, interval=0.8),
    "a status": Endless(b"", b"H", chunked=False, interval=0.01),
    "a header": Endless(OK + b"a: ", b"b", chunked=False, interval=0.01),
    "headers": Endless(OK, b"a: b\r\n", chunked=False, interval=0.2),
    "a chunk's extension": Endless(CHUNKED + b"\r\n1;", b"x", chunked=False, interval=0.01),
    "trailers": Endless(CHUNKED + b"\r\n0\r\n", b"a: b\r\n", chunked=False, interval=0.2),
}


def opened(request, tmp_path_factory, **environ):
    folder = tmp_path_factory.mktemp("faults")
    return House(new_database(request, BACKENDS[0], folder), folder, **environ)


def timeouts(**seconds):
    return {f"PERPETUO_{name}_TIMEOUT": value for name, value in seconds.items()}


@pytest.fixture(scope="module")
def house(request, tmp_path_factory):
    """A server whose own bounds alone end a call."""
    patient = timeouts(FIRST_BYTE="100", IDLE="100", TOTAL="100")
    with opened(request, tmp_path_factory, **patient) as built:
        yield built


@pytest.fixture(scope="module")
def hasty(request, tmp_path_factory):
    with opened(request, tmp_path_factory, **timeouts(FIRST_BYTE="1", IDLE="1", TOTAL="6")) as built:
        yield built


@pytest.fixture(scope="module")
def talkative(request, tmp_path_factory):
    """A server that says something after a fifth of a second of silence."""
    with opened(request, tmp_path_factory, **HASTY, KEEP_ALIVE_SECONDS="0.2") as built:
        yield built


def ask(house, tenant, is_stream):
    response = house.post(tenant, stream=is_stream)
    assert response.content
    return response


class Memory:
    """The resident memory of a process, and how far it grew at its peak."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")  # the peak begins anew: proc(5)
        self._before = self._read("VmRSS")

    @property
    def growth(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", (self._folder / "status").read_text())
        assert found is not None
        return int(found[1]) * 1024


@STREAMS
@pytest.mark.parametrize("fault", ENDLESS)
def test_an_upstream_that_never_stops_is_left_and_disturbs_nobody(house, fault, is_stream):
    flood = ENDLESS[fault]()
    good = stream(text="from the second") if is_stream else completion("from the second")
    with (
        FaultUpstream(reply=flood) as upstream,
        FakeUpstream(reply=good) as second,
        ThreadPoolExecutor(1) as pool,
    ):
        tenant = new_tenant(house.gateway)
        tenant.add_provider_key(upstream.base_url, models=["gpt-4o"])
        tenant.add_provider_key(second.base_url, provider="custom", models=["gpt-4o"], priority=1)
        neighbour = house.tenant(second)
        memory = Memory(house.server.workers()[0])
        asking = pool.submit(ask, house, tenant, is_stream)
        upstream.wait_for_requests(1)
        assert ask(house, neighbour, is_stream).status_code == 200
        response = asking.result()
        assert response.status_code == 200, response.text
        assert "second" in response.text
        assert memory.growth < MOST_GROWTH_BYTES
        upstream.wait_for_close(upstream.requests[0])
        assert flood.sent_bytes < MOST_SENT_BYTES
        (row,) = house.settled(tenant)
        assert row["status"] == "ok"
        assert [a["error"] and a["error"]["code"] for a in row["attempts"]] == ["upstream_error", None]


BOMBS = {
    "lists": b'{"choices":[' + b"[]," * (20 * MIB) + b"[]]}",
    "texts": b'{"choices":[' + b'"ab",' * (12 * MIB) + b'"ab"]}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_answer_that_would_parse_to_gigabytes_is_refused(house, bomb):
    with FaultUpstream(reply=packed(gzip.compress(BOMBS[bomb], 1))) as upstream:
        tenant = house.tenant(upstream)
        memory = Memory(house.server.workers()[0])
        response = house.post(tenant)
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")
        assert memory.growth < BOMB_GROWTH_BYTES
        house.settled(tenant)


def at_once(house, faults, is_stream):
    """Every fault with an upstream and a workspace of its own, all at the same time."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(faults)))
        upstreams = [stack.enter_context(FaultUpstream(reply=reply)) for reply in faults.values()]
        tenants = [house.tenant(upstream) for upstream in upstreams]
        responses = list(pool.map(lambda tenant: ask(house, tenant, is_stream), tenants))
        for fault, response, upstream, tenant in zip(faults, responses, upstreams, tenants, strict=True):
            (row,) = house.settled(tenant)
            assert row["id"] == response.headers["x-request-id"]
            yield fault, response, row, upstream


@STREAMS
def test_every_silence_and_drip_ends_in_time(hasty, is_stream):
    faults = {name: reply for name, (reply, _) in SILENT.items()} | DRIPS
    for fault, response, row, upstream in at_once(hasty, faults, is_stream):
        assert response.status_code == 504, (fault, response.text)
        assert response.json()["error"]["code"] == "upstream_timeout", fault
        assert (row["status"], row["http_status"], row["error_code"]) == ("error", 504, "upstream_timeout")
        assert (row["cost_nano"], row["usage_source"]) == (0, None)
        assert {attempt["error"]["code"] for attempt in row["attempts"]} == {"upstream_timeout"}, fault
        for asked in upstream.requests:
            upstream.wait_for_close(asked)
        # A plain call has one deadline for all of it, a stream one for the first word of each try.
        assert len(row["attempts"]) == (3 if is_stream else 1), fault
    wait_until(lambda: hasty.server.is_up())


def test_every_break_after_the_first_words_ends_in_an_error_event(hasty):
    # The endless ones end by their bytes or by the time, whichever comes first.
    faults = {name: reply for name, reply in {**LATE, **LATE_SILENT}.items() if "endless" not in name}
    for fault, response, row, _ in at_once(hasty, faults, True):
        first, *_, last = (json.loads(part) for part in re.findall(r"^data: (.*)$", response.text, re.M))
        assert first["choices"][0]["delta"]["content"] == "Once upon", fault
        assert last["error"]["code"] == row["error_code"], fault
        assert row["error_code"] == ("upstream_timeout" if fault in LATE_SILENT else "upstream_error"), fault
        assert "[DONE]" not in response.text
        assert (row["status"], row["http_status"], row["usage_source"]) == ("error", 200, "estimate")
        assert len(row["attempts"]) == 1


def pausing(*parts, headers=None):
    """The parts of a body, each in one packet, with a second of silence before each."""

    def reply(exchange):
        exchange.wait(1.0)
        exchange.start(200, headers)
        for number, part in enumerate(parts, 1):
            exchange.wait(1.0)
            exchange.write(part, last=number == len(parts))

    return reply


def test_all_silence_of_a_stream_is_bridged_by_comments(talkative):
    deflate = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    packed_words = deflate.compress(WORDS) + deflate.flush(zlib.Z_SYNC_FLUSH)
    pauses = {
        "plain": pausing(WORDS, LAST),
        "packed": pausing(
            packed_words, deflate.compress(LAST) + deflate.flush(), headers={"Content-Encoding": "gzip"}
        ),
    }
    for fault, response, row, upstream in at_once(talkative, pauses, True):
        before, words, after = re.split(r"(data: .*?Once upon.*?\n\n)", response.text)
        assert before.count(": keep-alive\n\n") >= 3, fault
        assert after.count(": keep-alive\n\n") >= 2, fault
        assert after.endswith("data: [DONE]\n\n"), fault
        assert (row["status"], upstream.connections) == ("ok", 1)


def test_a_whole_stream_whose_end_drips_is_whole(hasty):
    head = CHUNKED + b"\r\n" + chunk(WORDS) + chunk(LAST)
    ends = {
        "trailers": Endless(head + b"0\r\n", b"a: b\r\n", chunked=False, interval=0.02),
        "flood of trailers": Endless(head + b"0\r\n", b"a: b\r\n" * 1000, chunked=False),
        "more": Endless(head, event({"choices": []}), interval=0.02),
    }
    for fault, response, row, _ in at_once(hasty, ends, True):
        assert response.text.endswith("data: [DONE]\n\n"), fault
        assert row["status"] == "ok", fault
