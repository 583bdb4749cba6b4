import time
from collections import Counter
from contextlib import ExitStack, closing

import pytest
import requests

from tests.conftest import BACKENDS
from tests.fake_upstream import FakeUpstream, completion, event, stall_after
from tests.house import House, new_database
from tests.serving import wait_until
from tests.slow_clients import HASTY, Crowd, allow_descriptors, chat, complaints, dripping, gauge, head

USUAL_SECONDS = 5  # for a good request meanwhile; it takes milliseconds
SLACK_SECONDS = 30
LARGE = 400_000  # bytes: more than lie in the buffers of a connection of these crowds
FEW, MANY = 150, 1000
GONE = ("client_closed", 200, None)
LATE = ("refused", 408, "request_timeout")
OK = ("ok", 200, None)


def large_stream(exchange):
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "x" * 8000}, "finish_reason": None}]}
    exchange.start(200, {"Content-Type": "text/event-stream"})
    for _ in range(LARGE // 8000):
        exchange.write(event(chunk))
    exchange.wait()


class Good:
    """A client as it should be: a completion, a stream, and a look at the server's health."""

    def __init__(self, house, tenant):
        self.house, self.tenant = house, tenant
        self.seconds = []

    def visit(self):
        for ask in (self.whole, self.streamed, self.health):
            began = time.monotonic()
            ask()
            self.seconds.append(time.monotonic() - began)

    def whole(self):
        assert self.house.post(self.tenant).status_code == 200

    def streamed(self):
        assert self.house.post(self.tenant, stream=True).text.endswith("data: [DONE]\n\n")

    def health(self):
        assert requests.get(f"{self.house.server.url}/healthz", timeout=30).status_code == 200


class Siege:
    """Crowds of every kind before one worker, each kind with its own workspace."""

    def __init__(self, house, stack, count):
        self.house, self.stack, self.count = house, stack, count
        self.tenants, self.crowds = {}, {}
        self.good = Good(house, self.tenant("good", None))

    def tenant(self, name, reply):
        upstream = self.stack.enter_context(FakeUpstream(reply=reply))
        self.tenants[name] = self.house.tenant(upstream)
        return self.tenants[name]

    def crowd(self, name, opening, *, is_answered=False):
        made = Crowd(self.house.server.port, self.count, opening, is_answered=is_answered)
        self.crowds[name] = self.stack.enter_context(closing(made))
        return made

    def gather(self):
        """Everybody is there. Those with the shortest time come last."""
        answered = {"is_answered": True}
        self.crowd("reader", chat(self.tenant("reader", large_stream), stream=True), **answered)
        plain = self.tenant("plain", completion(text="x" * LARGE))
        self.crowd("plain", chat(plain), **answered)
        left = stall_after(3)
        self.crowd("half", chat(self.tenant("half", left), stream=True), **answered).close_half()
        self.crowd("reset", chat(self.tenant("reset", left), stream=True), **answered).reset()
        del self.crowds["reset"]
        path, length = "/v1/chat/completions", {"Content_Length": 5000}
        self.crowd("stalled", head(path, self.tenant("stalled", None).key, **length) + b"{")
        self.crowd("dripped", head(path, self.tenant("dripped", None).key, **length))
        self.crowd("form", head("/auth/login", **length) + b"{")
        self.crowd("idle", b"")
        self.crowd("header", b"GET /healthz HTTP/1.1\r\nX-Slow: ")

    def hanging(self):
        return {name: self.count - crowd.count_gone() for name, crowd in self.crowds.items()}

    def endure(self, seconds):
        """Good requests, until the last of the others has been let go."""
        until = time.monotonic() + seconds
        while any(hanging := self.hanging().values()):
            self.good.visit()
            assert time.monotonic() < until, hanging
            time.sleep(0.2)

    def outcomes(self, name):
        found = Counter()
        for row in self.house.rows(self.tenants[name]):
            found[row["status"], row["http_status"], row["error_code"]] += row["count"]
        return dict(found)


def descriptors(house):
    """Those of the worker, without what it keeps for its next calls."""
    return gauge(house, "open_descriptors") - gauge(house, "upstream_connections_idle")


@pytest.fixture
def besieged(request, tmp_path):
    """One worker that gives its clients so many seconds."""
    seconds, count = request.param
    wanted = 15 * count + 1000
    if allow_descriptors(wanted) < wanted:
        pytest.skip(f"needs {wanted} descriptors")
    settings = {"PERPETUO_MAX_IN_FLIGHT": "20000", "HASTY_SECONDS": str(seconds), **HASTY}
    url = new_database(request, BACKENDS[0], tmp_path)
    with House(url, tmp_path, **settings) as built, ExitStack() as stack:
        siege = Siege(built, stack, count)
        siege.seconds = seconds
        yield siege


@pytest.mark.parametrize(
    "besieged",
    [pytest.param((8, FEW), id="few"), pytest.param((60, MANY), id="many", marks=pytest.mark.torture)],
    indirect=True,
)
def test_all_kinds_of_slow_clients_at_once_disturb_nobody(besieged):
    house, good = besieged.house, besieged.good
    good.visit()
    before = descriptors(house)
    besieged.gather()
    wait_until(lambda: gauge(house, "ledger_rows_waiting") == 0, SLACK_SECONDS)
    assert sum(besieged.hanging().values()) > besieged.count  # there is something to endure
    good.seconds.clear()
    with dripping(besieged.crowds["header"], besieged.crowds["dripped"]):
        besieged.endure(besieged.seconds + SLACK_SECONDS)
    assert max(good.seconds) < USUAL_SECONDS
    wait_until(lambda: gauge(house, "calls_in_flight") == 0)
    wait_until(lambda: descriptors(house) <= before + 10, explain=lambda: str((before, descriptors(house))))
    count = besieged.count
    ends = {"reader": GONE, "half": GONE, "reset": GONE, "stalled": LATE, "dripped": LATE, "plain": OK}
    for name, end in ends.items():
        wait_until(
            lambda n=name, e=end: besieged.outcomes(n) == {e: count},
            explain=lambda n=name: str(besieged.outcomes(n)),
        )
    house.settled(besieged.tenants["good"])
    assert not complaints(house)
