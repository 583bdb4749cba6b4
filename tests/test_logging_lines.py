import json
import logging
import re
import signal
import socket
from contextlib import ExitStack, suppress

import psycopg2
import pytest
import requests
from sqlalchemy.engine import make_url

from perpetuo import log_lines
from perpetuo.config import load
from perpetuo.gateway.walk import Gateway
from tests import postgres
from tests.conftest import BACKENDS, migrate
from tests.fake_upstream import FakeUpstream, completion, cut_after, raw, stall_after, status, stream
from tests.fault_proxy import FaultProxy
from tests.serving import ROOT, Serving, wait_until
from tests.tenants import new_tenant

CANARY = "canary"  # in everything that must not be logged
PROVIDER_KEY = "sk-canary-provider-key"
PASSWORD = "canary password"
PROMPT, ANSWER = "canary-prompt", "canary-answer"
LEVELS = ("debug", "info", "warning", "error", "critical")


def lines_of(server):
    """What the server has logged, each line an object with the fields that every line has."""
    lines = [json.loads(line) for line in server.log.splitlines()]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in LEVELS
        assert isinstance(line["process"], int)
        assert line["logger"]
        assert line["message"]
    return lines


def tells_nothing(server, *secrets):
    for secret in (CANARY, *secrets):
        assert secret not in server.log, [line for line in server.log.splitlines() if secret in line]


def errors_of(server, request_id):
    return "\n".join(
        line.get("error", "") for line in lines_of(server) if line.get("request_id") == request_id
    )


class Faulty:
    """The real server with bugs in it (`tests/faulty_wsgi.py`), and one tenant."""

    def __init__(self, database_url, folder):
        (folder / "wsgi.py").symlink_to(ROOT / "tests/faulty_wsgi.py")
        (folder / "gunicorn.conf.py").symlink_to(ROOT / "gunicorn.conf.py")
        self.gateway = Gateway(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(folder)}))
        self.upstream = FakeUpstream(reply=completion(ANSWER))
        self.tenant = new_tenant(self.gateway)
        self.tenant.add_provider_key(self.upstream.base_url, PROVIDER_KEY)
        self.server = Serving(database_url, folder, root=folder, PYTHONPATH=str(ROOT))

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        self.server.stop()
        self.upstream.close()
        self.gateway.close()

    def ask(self, text="", **fields):
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": f"{PROMPT} {text}"}], **fields}
        url = f"{self.server.url}/v1/chat/completions"
        return requests.post(url, json=body, headers=self.tenant.headers, timeout=100, stream=True)

    def send(self, request):
        """Bytes that may be no HTTP."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as connection:
            connection.sendall(request)
            with suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass


@pytest.fixture
def faulty(database_url, tmp_path):
    with Faulty(database_url, tmp_path) as running:
        yield running


def test_bugs_are_told_with_their_request_and_without_what_they_quote(faulty):
    early, late, poison = faulty.ask("BUG EARLY"), faulty.ask("BUG LATE"), faulty.ask("POISON")
    assert (early.status_code, late.status_code, poison.status_code) == (500, 500, 503)
    assert "builtins.ValueError: (not told" in errors_of(faulty.server, early.headers["x-request-id"])
    told = errors_of(faulty.server, late.headers["x-request-id"])
    assert told.index("builtins.ValueError") < told.index("which led to") < told.index("builtins.KeyError")
    assert "in send_with_bug" in told
    constraint = "SQLSTATE 23502" if faulty.gateway.database.for_update else "NOT NULL constraint failed"
    assert constraint in errors_of(faulty.server, poison.headers["x-request-id"])
    tells_nothing(faulty.server, faulty.tenant.key)


def test_what_passes_the_log_by_becomes_lines_of_it(faulty):
    messages = "\n".join(line["message"] for line in lines_of(faulty.server))
    for told in ("a warning\nof two lines", "printed past the log", "a thread failed", "a greenlet failed"):
        assert told in messages
    secret = load({"PERPETUO_DATA": str(faulty.server.folder)}).secret_keys[0]
    tells_nothing(faulty.server, secret)


def test_requests_that_cannot_be_read_are_not_quoted(faulty):
    broken = [f"{PROMPT}\r\n\r\n", f"GET / HTTP/1.1\r\n{PROMPT}\r\n\r\n", f"GET /{PROMPT} HTTP/9\r\n\r\n"]
    broken += [f"GET /escape?q={PROMPT} HTTP/1.1\r\nHost: x\r\n\r\n"]
    for request in broken:
        faulty.send(request.encode())
    told = [line["message"] for line in lines_of(faulty.server)]
    assert sum("Invalid request from ip=127.0.0.1: Invalid HTTP" in message for message in told) == 3
    assert "Error handling request GET /escape" in told
    tells_nothing(faulty.server)


def test_upstreams_clients_and_people_leave_nothing_of_theirs(faulty):
    said = {"error": {"message": ANSWER}}
    for reply in (status(500, said), status(401, said), raw(ANSWER.encode()), status(200, ANSWER.encode())):
        faulty.upstream.reply = reply
        assert faulty.ask().status_code == 502
    faulty.upstream.reply = cut_after(700, stream(text=f"{ANSWER} " * 100))
    assert "error" in faulty.ask(stream=True).text
    faulty.upstream.reply = stall_after(3, stream(text=ANSWER))
    faulty.ask(stream=True).close()  # leaves in the middle
    person = {"email": "canary@example.com", "password": PASSWORD}
    signed_up = requests.post(f"{faulty.server.url}/auth/signup", json=person, timeout=10)
    requests.post(f"{faulty.server.url}/auth/login", json={**person, "password": PASSWORD * 2}, timeout=10)
    requests.post(f"{faulty.server.url}/auth/signup", json=person, timeout=10)
    requests.get(
        f"{faulty.server.url}/auth/me?key={PROMPT}", headers={"Cookie": f"session={CANARY}"}, timeout=10
    )
    lines_of(faulty.server)
    tells_nothing(faulty.server, faulty.tenant.key, signed_up.json()["token"])


def test_workers_come_and_go_in_lines(faulty):
    killed = faulty.server.kill_worker()
    wait_until(lambda: len(faulty.server.workers()) == 2 and killed not in faulty.server.workers())
    faulty.server.signal(signal.SIGHUP)  # gunicorn reads its configuration and sets its log up again
    wait_until(lambda: "Hang up" in faulty.server.log)
    wait_until(faulty.server.is_up)
    faulty.server.stop()
    told = [line["message"] for line in lines_of(faulty.server)]
    assert any("SIGKILL" in message for message in told)
    assert told[-1] == "Shutting down: Master"
    assert len([message for message in told if message == "Shutting down: Master"]) == 1


@pytest.mark.skipif("postgresql" not in BACKENDS, reason="about PostgreSQL")
def test_an_outage_of_the_database_is_told_in_lines(tmp_path):
    database = postgres.start(tcp=True)
    with ExitStack() as stack, FaultProxy(database.address) as proxy:
        stack.callback(database.stop)
        url = database.create_database("outage")
        migrate(url, tmp_path)
        with Faulty(database.tcp_url(make_url(url).database, proxy.address), tmp_path) as faulty:
            assert faulty.ask().status_code == 200
            proxy.refuse = True
            proxy.cut()
            wait_until(lambda: faulty.ask().status_code == 503)
            wait_until(lambda: "the sweep could not look" in faulty.server.log, 20)
            proxy.refuse = False
            wait_until(lambda: faulty.ask().status_code == 200)
            lines_of(faulty.server)
            tells_nothing(faulty.server, faulty.tenant.key)


def test_faults_of_the_settings_are_one_line(tmp_path):
    server = Serving("mysql://root:canary@x/y", tmp_path, PERPETUO_ORPHAN_GRACE="soon")
    with pytest.raises(AssertionError):
        server.start()
    (line,) = lines_of(server)
    assert line["level"] == "critical"
    assert "DATABASE_URL must be" in line["message"]
    assert "PERPETUO_ORPHAN_GRACE must be" in line["message"]
    tells_nothing(server)


def told(error):
    """The last line of what is told of an exception."""
    return log_lines.trace(error).splitlines()[-1]


def test_messages_that_help_and_quote_nothing_are_told():
    assert told(AttributeError("'str' object has no attribute 'x'")).endswith("attribute 'x'")
    assert told(ConnectionRefusedError(111, "Connection refused")).endswith("Connection refused")
    assert "no password supplied" in told(
        psycopg2.OperationalError("connection failed: no password supplied")
    )
    assert "not told" in told(UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY))
    assert "not told" in told(requests.ConnectionError(CANARY))


def test_people_at_a_terminal_get_lines_for_people():
    record = logging.LogRecord("perpetuo", logging.ERROR, "", 0, "it %s", ("failed",), None)
    record.request_id = "req_1"
    line = log_lines.Lines(for_people=True).format(record)
    assert re.fullmatch(rf"\S+Z error {record.process} it failed \(req_1\)", line)
