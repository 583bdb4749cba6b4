import signal
import socket
import threading
from collections import Counter
from contextlib import ExitStack

import pytest
import requests
import sqlalchemy as sa

from perpetuo.config import load
from perpetuo.gateway.audit import differences
from perpetuo.gateway.walk import Gateway
from perpetuo.models import RequestLog
from tests.conftest import BACKENDS, migrate
from tests.fake_upstream import FakeUpstream, auto, stall_after, stream
from tests.nginx import nginx, printed
from tests.serving import Serving, wait_until
from tests.tenants import new_tenant

pytestmark = pytest.mark.skipif("postgresql" not in BACKENDS, reason="two instances share a PostgreSQL")
PLAIN, STREAMING = 6, 3
LONG = " ".join(["word"] * 60)  # a second and more, at 20 ms a word


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pair:
    """Two instances that share a PostgreSQL, behind the README's nginx."""

    def __init__(self, database_url, folder):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {"PUBLIC_URL": self.url, "PERPETUO_DRAIN_TIMEOUT": "15"}
        self.instances = [Serving(database_url, folder, **settings) for _ in range(2)]
        self.gateway = Gateway(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(folder)}))
        self.upstream = FakeUpstream(reply=auto(echo=True, delay=0.02))
        self.tenant = new_tenant(self.gateway)
        self.tenant.add_provider_key(self.upstream.base_url)
        self.log = None
        self.stack = ExitStack()
        self.folder = folder

    def __enter__(self):
        self.stack.callback(self.gateway.close)
        self.stack.enter_context(self.upstream)
        for instance in self.instances:
            self.stack.enter_context(instance)
        self.log = self.stack.enter_context(nginx(self.folder / "nginx", self.port, self.instances))
        return self

    def __exit__(self, *_):
        self.stack.close()

    def ask(self, session=requests, text="Hello", **fields):
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], **fields}
        url = f"{self.url}/v1/chat/completions"
        return session.post(
            url, json=body, headers=self.tenant.headers, timeout=60, stream=bool(fields.get("stream"))
        )

    def restart(self, instance):
        instance.signal(signal.SIGTERM)
        instance.process.wait(60)
        instance.start()


class Load:
    """Clients that ask without pause, some for streams, and none of which asks twice for one answer."""

    def __init__(self, pair):
        self.pair = pair
        self.outcomes = Counter()
        self.is_over = False
        kinds = [False] * PLAIN + [True] * STREAMING
        self.threads = [threading.Thread(target=self.ask, args=(is_stream,)) for is_stream in kinds]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.is_over = True
        for thread in self.threads:
            thread.join(60)

    def ask(self, is_stream):
        with requests.Session() as session:
            while not self.is_over:
                self.outcomes["stream" if is_stream else "plain", self.outcome(session, is_stream)] += 1

    def outcome(self, session, is_stream):
        try:
            answer = self.pair.ask(session, LONG if is_stream else "Hello", stream=is_stream)
            whole = answer.text.endswith("data: [DONE]\n\n") if is_stream else "choices" in answer.json()
        except requests.RequestException as exc:
            return type(exc).__name__
        return "ok" if answer.status_code == 200 and whole else f"{answer.status_code} {answer.text[-200:]}"

    def wait_for_more(self):
        plain, streams = self.outcomes["plain", "ok"], self.outcomes["stream", "ok"]
        wait_until(
            lambda: self.outcomes["plain", "ok"] > plain + 10 and self.outcomes["stream", "ok"] > streams,
            60,
            lambda: str(self.outcomes),
        )


@pytest.fixture
def pair(server, tmp_path):
    url = server.create_database(f"pair_{free_port()}")
    migrate(url, tmp_path)
    with Pair(url, tmp_path) as running:
        wait_until(lambda: requests.get(f"{running.url}/readyz", timeout=5).status_code == 200)
        yield running


def test_instances_restarted_in_turn_fail_no_call_and_cut_no_stream(pair):
    with Load(pair) as load_:
        for instance in pair.instances:
            load_.wait_for_more()
            pair.restart(instance)
    failed = {outcome: count for outcome, count in load_.outcomes.items() if outcome[1] != "ok"}
    assert failed == {}, pair.log.read_text()
    assert len(pair.upstream.requests) == load_.outcomes.total(), "a call was sent upstream twice"
    rows = sa.select(RequestLog.status, RequestLog.error_code, sa.func.count()).group_by(
        RequestLog.status, RequestLog.error_code
    )
    found = {(row[0], row[1]): row[2] for row in pair.gateway.database.read(lambda c: c.execute(rows).all())}
    assert found.pop(("ok", None)) == load_.outcomes.total()
    assert set(found) <= {("refused", "shutting_down")}
    assert differences(pair.gateway.database) == []


def test_a_stream_passes_nginx_as_it_comes_and_ends_when_its_client_leaves(pair):
    pair.upstream.reply = stall_after(3, stream(text="Hello world"))
    response = pair.ask(stream=True)
    lines = response.iter_lines()
    assert any(b"Hello" in line for line in lines)
    response.close()
    pair.upstream.wait_for_close(pair.upstream.requests[0])


def test_people_reach_the_gateway_by_its_public_url(pair):
    person = {"email": "ann@example.com", "password": "a long password"}
    assert requests.post(f"{pair.url}/auth/signup", json=person, timeout=10).status_code == 201
    too_large = requests.post(
        f"{pair.url}/v1/chat/completions", data=b" " * 20971521, headers=pair.tenant.headers, timeout=30
    )
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "request_too_large")


def test_the_readme_gives_nginx_more_time_than_a_call_has(tmp_path):
    seconds = int(printed().partition("proxy_read_timeout ")[2].partition("s;")[0])
    assert seconds > load({"PERPETUO_DATA": str(tmp_path)}).total_timeout
