import threading
from collections import Counter
from contextlib import ExitStack, closing

import pytest
import requests

from tests.conftest import BACKENDS
from tests.fake_upstream import FakeUpstream, hang
from tests.house import CHAT, House, new_database
from tests.serving import Serving, wait_until
from tests.slow_clients import Crowd, gauge, head

MOST = 10
CAP = {"PERPETUO_MAX_IN_FLIGHT": str(MOST)}


@pytest.fixture(scope="module", params=BACKENDS)
def capped_house(request, tmp_path_factory):
    """One worker with places for ten calls, five for each workspace."""
    folder = tmp_path_factory.mktemp("capped")
    with House(new_database(request, request.param, folder), folder, **CAP) as built:
        yield built


@pytest.fixture
def capped(capped_house):
    """Afterwards every place is free again."""
    yield capped_house
    wait_until(lambda: gauge(capped_house, "calls_in_flight") == 0)


class Callers:
    """So many calls at once to an upstream that answers none of them until `end`."""

    def __init__(self, url, tenant, count):
        self.url, self.tenant = url, tenant
        self.refusals, self.answers = [], []
        self.threads = [threading.Thread(target=self._call) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _call(self):
        response = requests.post(
            f"{self.url}/v1/chat/completions", json=CHAT, headers=self.tenant.headers, timeout=60
        )
        (self.refusals if response.status_code == 503 else self.answers).append(response)

    def end(self):
        for thread in self.threads:
            thread.join()


@pytest.fixture
def silent():
    """An upstream that answers nothing, and refuses everybody once it is closed."""
    with FakeUpstream(reply=hang()) as fake:
        yield fake


def are_refused(callers, count):
    wait_until(lambda: len(callers.refusals) >= count, 30)
    assert len(callers.refusals) == count
    for response in callers.refusals:
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1


def have_ended(house, tenant, refused, failed=0):
    """Refusals beyond the twentieth in a second share a row, which is written once that second is over."""
    wanted = {("refused", "overloaded"): refused, ("error", "upstream_error"): failed}

    def found():
        ends = Counter()
        for row in house.rows(tenant):
            ends[row["status"], row["error_code"]] += row["count"]
        return ends

    wait_until(lambda: found() == Counter(wanted), explain=lambda: str(found()))
    house.settled(tenant)


def test_a_workspace_takes_half_and_what_is_beyond_is_refused(capped, silent):
    first, second, third = [capped.tenant(silent) for _ in range(3)]
    url = capped.server.url
    one = Callers(url, first, 30)
    are_refused(one, 25)
    two = Callers(url, second, 8)
    are_refused(two, 3)
    three = Callers(url, third, 2)
    are_refused(three, 2)
    assert len(silent.wait_for_requests(MOST)) == MOST
    assert requests.get(f"{url}/healthz", timeout=10).status_code == 200
    silent.close()
    for callers in (one, two, three):
        callers.end()
    have_ended(capped, first, 25, 5)
    have_ended(capped, second, 3, 5)
    have_ended(capped, third, 2)


def test_places_that_were_given_back_are_taken_again(capped, silent, upstream):
    full, other = capped.tenant(silent), capped.tenant(upstream)
    callers = Callers(capped.server.url, full, 6)
    are_refused(callers, 1)
    assert capped.post(other).status_code == 200
    silent.close()
    callers.end()
    assert [capped.post(other).status_code for _ in range(MOST)] == [200] * MOST


def test_stalled_bodies_take_no_more_than_half_either(capped, upstream):
    stalling, other = capped.tenant(upstream), capped.tenant(upstream)
    opening = head("/v1/chat/completions", stalling.key, Content_Length=500)
    with closing(Crowd(capped.server.port, 30, opening)) as crowd:
        wait_until(lambda: len(crowd.answered()) == 25)
        assert capped.post(other).status_code == 200
        assert requests.get(f"{capped.server.url}/healthz", timeout=10).status_code == 200
        assert {m.recv(13) for m in crowd.answered()} == {b"HTTP/1.1 503 "}


def test_two_workers_have_so_many_places_each(request, tmp_path, silent):
    with ExitStack() as stack:
        house = House(new_database(request, BACKENDS[0], tmp_path), tmp_path)
        stack.callback(house.gateway.close)
        url = f"{house.gateway.database.url.render_as_string(hide_password=False)}"
        server = stack.enter_context(Serving(url, tmp_path, workers=2, **CAP))
        tenants = [house.tenant(silent) for _ in range(3)]
        callers = [Callers(server.url, tenant, 30) for tenant in tenants]

        def are_decided():
            return sum(len(some.refusals) for some in callers) + len(silent.requests) == 90

        wait_until(are_decided, 30)
        assert MOST / 2 <= len(silent.requests) <= 2 * MOST
        assert all(len(some.refusals) >= 30 - MOST for some in callers)
        assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 200
        silent.close()
        for some in callers:
            some.end()
        for tenant, some in zip(tenants, callers, strict=True):
            have_ended(house, tenant, len(some.refusals), len(some.answers))
