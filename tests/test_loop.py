"""The event loop is never held up: the longest pause of a worker under everything at once.

A busy machine makes pauses of its own, so the best of a few runs counts: what holds the loop does so in each.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import sqlalchemy as sa

from perpetuo.config import load
from perpetuo.gateway.walk import Gateway
from perpetuo.models import COUNTS, LATENCY_BUCKETS, SUMS, TTFT_BUCKETS, RequestLog, UsageCounter
from tests.fake_upstream import FakeUpstream
from tests.house import CHAT
from tests.people import PASSWORD
from tests.serving import Serving
from tests.tenants import Tenant
from tests.test_metrics import told

GOAL_SECONDS = 0.1
MOST_SECONDS = 0.2  # what a machine that is busy with other things may make of it
RUNS = 6
ROUNDS = 3  # of each kind of work in a run
ROWS = 20_000
EMAIL = "loop@example.com"


def fill(gateway: Gateway, workspace_id: str) -> None:
    """As many rows as one filtered page may read, and a month's counters of two busy keys."""
    now = datetime.now(UTC)
    row = {
        "workspace_id": workspace_id,
        "api_key_id": "key_1",
        "api_key_name": "test",
        "owner": 1,
        "status": "ok",
        "endpoint": "chat.completions",
        "stream": False,
        "model": "gpt-4o",
        "count": 1,
        "http_status": 200,
        "preview_prompt": "a question " * 15,
        "preview_answer": "an answer " * 15,
        "attempts": [{"provider": "openai", "http_status": 200, "error": None}],
    }
    rows = [{**row, "id": f"req_{n:06}", "created_at": now - timedelta(seconds=n)} for n in range(ROWS)]
    hour = now.replace(minute=0, second=0, microsecond=0)
    ones = dict.fromkeys((*COUNTS, *SUMS, *LATENCY_BUCKETS, *TTFT_BUCKETS), 1)
    counters = [
        {"workspace_id": workspace_id, "hour": hour - timedelta(hours=h), "api_key_id": f"key_{k}"}
        | {"provider": "openai", "model": "gpt-4o", **ones}
        for h in range(720)
        for k in range(2)
    ]

    def insert(connection: sa.Connection) -> None:
        for start in range(0, ROWS, 2000):  # short of the time that a transaction may take
            connection.execute(sa.insert(RequestLog), rows[start : start + 2000])
        connection.execute(sa.insert(UsageCounter.__table__), counters)

    gateway.database.transaction(insert, 60)


class Work:
    """Everything that people and programs do at once, each kind in a thread of its own."""

    def __init__(self, server: Serving, tenant: Tenant) -> None:
        self.url, self.tenant = server.url, tenant
        self.failures: list[str] = []
        self.is_over = False
        signed_in = self.sign_in(requests.Session())
        self.mine = f"{self.url}/workspaces/{tenant.workspace_id}"
        self.token = {"Authorization": f"Bearer {signed_in.json()['token']}"}
        self.long = "".join(random.Random(1).choices("abcdefghij ", k=200 * 1024))

    def sign_in(self, session: requests.Session) -> requests.Response:
        return session.post(f"{self.url}/auth/login", json={"email": EMAIL, "password": PASSWORD})

    def call(self, session: requests.Session, **fields: Any) -> requests.Response:
        url = f"{self.url}/v1/chat/completions"
        return session.post(url, json={**CHAT, **fields}, headers=self.tenant.headers)

    def call_with_a_long_body(self, session: requests.Session) -> requests.Response:
        return self.call(session, messages=[{"role": "user", "content": self.long}])

    def stream(self, session: requests.Session) -> requests.Response:
        return self.call(session, stream=True)

    def look_at(self, path: str) -> Callable[[requests.Session], requests.Response]:
        return lambda session: session.get(f"{self.mine}{path}", headers=self.token)

    def run(self) -> None:
        """Each of the long pieces a few times, calls and streams until they are through."""
        pages = (
            "",
            "/logs?q=nowhere",
            "/logs?q=%C3%A9",
            "/logs?limit=200",
            "/logs.jsonl",
            "/logs.csv",
            "/usage?group_by=hour",
        )
        long: list[Callable[[requests.Session], requests.Response]] = [self.look_at(page) for page in pages]
        long += [self.call_with_a_long_body, self.sign_in]
        for work in (*long, self.call, self.stream):  # what is done for the first time takes longer
            self._repeat(work, 1)
        threads = [threading.Thread(target=self._repeat, args=(work, ROUNDS)) for work in long]
        beside = [
            threading.Thread(target=self._repeat, args=(work, None)) for work in (self.call, self.stream)
        ]
        for thread in (*threads, *beside):
            thread.start()
        for thread in threads:
            thread.join()
        self.is_over = True
        for thread in beside:
            thread.join()

    def _repeat(self, work: Callable[[requests.Session], requests.Response], rounds: int | None) -> None:
        with requests.Session() as session:
            while not self.is_over and rounds != 0:
                response = work(session)
                rounds = None if rounds is None else rounds - 1
                if response.status_code != 200 or not response.content:
                    self.failures.append(f"{response.request.path_url}: {response.status_code}")
                    return


@pytest.mark.timeout(600)
def test_nothing_holds_up_the_event_loop(database_url: str, tmp_path: Path):
    pauses = []
    with FakeUpstream() as upstream:
        gateway = Gateway(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(tmp_path)}))
        try:
            with Serving(database_url, tmp_path, workers=1) as server:
                body = {"email": EMAIL, "password": PASSWORD}
                made = requests.post(f"{server.url}/auth/signup", json=body, timeout=30).json()
            tenant = Tenant(gateway, made["workspace"]["id"])
            tenant.add_provider_key(upstream.base_url)
            tenant.add_api_key()
            fill(gateway, tenant.workspace_id)
        finally:
            gateway.close()
        while len(pauses) < RUNS and min(pauses, default=1.0) >= GOAL_SECONDS:
            with Serving(database_url, tmp_path, workers=1) as server:
                work = Work(server, tenant)
                work.run()
                assert not work.failures
                found = told(requests.get(f"{server.url}/metrics", timeout=30).text)
                pauses.append(found['loop_longest_pause_seconds[span="process"]'])
    assert min(pauses) < MOST_SECONDS, f"the loop stood still for {pauses} s"
