"""GET /metrics: what it tells, and whom."""

from __future__ import annotations

import os
import re

import pytest
from flask import Flask
from flask.testing import FlaskClient

from perpetuo import create_app
from perpetuo.config import load
from perpetuo.errors import Unavailable
from perpetuo.gateway.walk import Gateway
from perpetuo.pulse import SLOT_SECONDS, TICK_SECONDS, Pulse

TOKEN = "m" * 40
SAMPLE = re.compile(r'perpetuo_([a-z_]+)\{worker="(\d+)"(?:,([a-z]+="[a-z]+"(?:,[a-z]+="[a-z]+")*))?\} (\S+)')


def told(text: str) -> dict[str, float]:
    """The numbers by name, with the labels beyond `worker` in brackets."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, labels, value = SAMPLE.fullmatch(line).groups()
            found[f"{name}[{labels}]" if labels else name] = float(value)
    return found


def test_each_number_is_told_once_with_its_meaning_and_the_worker(client: FlaskClient):
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert response.text.endswith("\n")
    families = re.findall(r"^# TYPE (\S+) (?:gauge|counter)$", response.text, re.MULTILINE)
    assert families == re.findall(r"^# HELP (\S+) \S.*\.$", response.text, re.MULTILINE)
    assert len(set(families)) == len(families)
    samples = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert {line.partition("{")[0] for line in samples} == set(families)
    assert {SAMPLE.fullmatch(line)[2] for line in samples} == {str(os.getpid())}


def test_a_quiet_process_says_so(client: FlaskClient):
    found = told(client.get("/metrics").text)
    quiet = ("calls_in_flight", "draining", "ledger_rows_waiting", "ledger_failing")
    assert [found[name] for name in (*quiet, "upstream_connections_idle")] == [0] * 5
    assert found["resident_bytes"] > 1e6
    assert found["open_descriptors"] > 2
    assert found["cpu_seconds_total"] > 0


def test_the_numbers_are_those_of_the_process(client: FlaskClient, gateway: Gateway):
    call = gateway.calls.begin("ws_1", 60)
    gateway.ledger.writer.failure = Unavailable("The database is away.")
    gateway.calls.is_draining = True
    with gateway.database.reader.connect():
        found = told(client.get("/metrics").text)
    call.close()
    assert [found[name] for name in ("calls_in_flight", "draining", "ledger_failing")] == [1, 1, 1]
    assert found['database_connections[pool="read",state="used"]'] == 1
    found = told(client.get("/metrics").text)
    assert found['database_connections[pool="read",state="used"]'] == 0
    assert found['database_connections[pool="read",state="idle"]'] == 1


@pytest.mark.parametrize("header", [None, "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe9"])
def test_where_a_token_is_set_it_is_asked_for(settings, tmp_path, header: str | None):
    environ = {"PERPETUO_DATA": str(tmp_path), "PERPETUO_METRICS_TOKEN": TOKEN}
    app = create_app(load({**environ, "DATABASE_URL": settings.database_url.render_as_string(False)}))
    headers = {"Authorization": header} if header else {}
    refused = app.test_client().get("/metrics", headers=headers)
    allowed = app.test_client().get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    app.extensions["perpetuo"].close()
    assert (refused.status_code, refused.get_json()["error"]["code"]) == (401, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert "perpetuo_" not in refused.text
    assert allowed.status_code == 200


def test_any_host_may_ask_and_no_database_is_needed(app: Flask, gateway: Gateway, monkeypatch):
    def away(*_: object) -> None:
        raise Unavailable("The database is away.")

    monkeypatch.setattr(gateway.database, "read", away)
    assert app.test_client().get("/metrics", headers={"Host": "10.0.0.7:8000"}).status_code == 200


def test_a_pause_is_told_for_a_minute_and_for_the_process(monkeypatch):
    moment = 1000.0
    monkeypatch.setattr("perpetuo.pulse.monotonic", lambda: moment)
    pulse = Pulse()
    pulse._last = moment
    for seconds in (TICK_SECONDS, 0.3 + TICK_SECONDS, 0.1 + TICK_SECONDS):
        moment += seconds
        pulse._beat()
    assert pulse.longest == pytest.approx(0.3)
    assert pulse.longest_of_late() == pytest.approx(0.3)
    moment += 5 * SLOT_SECONDS
    pulse._last = moment - 0.2 - TICK_SECONDS
    pulse._beat()
    assert pulse.longest_of_late() == pytest.approx(0.3)
    moment += 2 * SLOT_SECONDS
    assert pulse.longest_of_late() == pytest.approx(0.2)
    moment += 7 * SLOT_SECONDS
    assert (pulse.longest_of_late(), pulse.longest) == (0.0, pytest.approx(0.3))
