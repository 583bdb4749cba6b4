"""Long mixed load with faults on living workers: nothing grows, the loop never stands still, the books agree.

PERPETUO_SOAK_SECONDS says how long; twenty minutes without it.
"""

import os
import random
import re
import statistics
import time
from collections import defaultdict

import pytest
import requests

from perpetuo import create_app
from perpetuo.config import load
from tests.fake_upstream import FakeUpstream, auto, cut_after, hang, html, reset_after, status
from tests.ordeal import endure, judge
from tests.serving import Serving

SECONDS = float(os.environ.get("PERPETUO_SOAK_SECONDS", "1200"))
FLAT = {
    "perpetuo_open_descriptors": 30,
    "perpetuo_greenlets": 30,
    "perpetuo_resident_bytes": 12e6,
    'perpetuo_database_connections{pool="all"}': 4,
}
LONGEST_PAUSE_SECONDS = 0.1
LINE = re.compile(r'^(\w+)\{worker="(\d+)"(?:,(.*))?\} (\S+)$', re.MULTILINE)


def unreliable():
    """An upstream that fails one time in eight, in each of the ways."""
    chance, good = random.Random(7), auto(echo=True, delay=0.002)
    ways = [status(500), status(429), status(400), html(), cut_after(300, good), reset_after(200, good)]
    ways += [lambda exchange: exchange.reset(), hang()]

    def reply(exchange):
        (good if chance.random() > 0.125 else chance.choice(ways))(exchange)

    return reply


class Owner:
    """A person with a workspace, who looks at pages while the keys are used."""

    def __init__(self, url, upstream):
        self.url, self.session = url, requests.Session()
        self.person = {"email": "owner@example.com", "password": "correct horse"}
        made = self.session.post(f"{url}/auth/signup", json=self.person).json()
        self.session.headers["Authorization"] = f"Bearer {made['token']}"
        self.workspace = f"{url}/workspaces/{made['workspace']['id']}"
        for priority in (0, 1):
            key = {"provider": "openai", "base_url": upstream.base_url, "api_key": "sk-up"}
            self.session.post(f"{self.workspace}/providers", json=key | {"priority": priority})
        made = self.session.post(f"{self.workspace}/api-keys", json={"name": "soak"}).json()
        self.headers = {"Authorization": f"Bearer {made['key']}"}

    def look(self, chance):
        """One of the things that people do."""
        path = chance.choice(
            ["logs?q=turn&limit=200", "logs?status=error", "usage?group_by=hour,model", "logs.csv"]
        )
        if chance.random() < 0.2:
            assert requests.post(f"{self.url}/auth/login", json=self.person, timeout=30).status_code == 200
        with self.session.get(f"{self.workspace}/{path}", timeout=60, stream=True) as response:
            assert response.status_code == 200
            if chance.random() < 0.8:  # else they leave in the middle
                assert response.content


class Gauges:
    """What the workers tell of themselves: by worker and name the values in time."""

    def __init__(self, url):
        self.url, self.seen = url, defaultdict(list)

    def scrape(self):
        told = requests.get(f"{self.url}/metrics", timeout=30).text  # a connection of its own: any worker
        connections = 0.0
        for name, worker, labels, value in LINE.findall(told):
            if name == "perpetuo_database_connections":
                connections += float(value)
            else:
                self.seen[worker, f"{name}{{{labels}}}" if labels else name].append(float(value))
        self.seen[worker, 'perpetuo_database_connections{pool="all"}'].append(connections)

    def growth(self):
        """By worker and name what the last quarter has more than the second, in the median."""
        grown = {}
        for (worker, name), values in self.seen.items():
            quarter = len(values) // 4
            if name in FLAT and quarter:
                early, late = values[quarter : 2 * quarter], values[-quarter:]
                grown[worker, name] = statistics.median(late) - statistics.median(early)
        return grown

    def longest_pause(self):
        name = 'perpetuo_loop_longest_pause_seconds{span="process"}'
        return max(max(values) for (_, told), values in self.seen.items() if told == name)


@pytest.mark.torture
@pytest.mark.timeout(SECONDS + 600)
def test_mixed_load_with_faults_leaves_everything_flat(database_url, tmp_path):
    settings = {"PERPETUO_FIRST_BYTE_TIMEOUT": "2", "PERPETUO_TOTAL_TIMEOUT": "4"}
    with FakeUpstream(reply=unreliable()) as upstream:
        with Serving(database_url, tmp_path, **settings) as server:
            owner, gauges, workers = Owner(server.url, upstream), Gauges(server.url), server.workers()

            def strike(chance):
                gauges.scrape()
                owner.look(chance)
                upstream.requests.clear()  # the fake remembers everything

            load_ = endure(server, owner.headers, 1, SECONDS, strike)
            time.sleep(6)  # keep-alive connections of clients end
            gauges.scrape()
            assert server.workers() == workers, server.log
        report(gauges)
        app = create_app(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(tmp_path)}))
        try:
            judge(app.extensions["perpetuo"].database, load_)
        finally:
            app.extensions["perpetuo"].close()
    assert "Traceback" not in server.log
    too_much = {key: value for key, value in gauges.growth().items() if value > FLAT[key[1]]}
    assert too_much == {}
    assert gauges.longest_pause() < LONGEST_PAUSE_SECONDS


def report(gauges):
    print(f"longest pause {gauges.longest_pause() * 1000:.0f} ms")
    for (worker, name), grown in sorted(gauges.growth().items()):
        values = gauges.seen[worker, name]
        print(f"{worker} {name}: from {values[0]:.0f} to {values[-1]:.0f}, grown by {grown:.0f}")
