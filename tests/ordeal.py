"""Mixed load while things are killed, and what must be true of the books afterwards.

A seed decides what the clients ask, when they leave, and when what is killed; it is printed, so that a
failing run can be repeated with PERPETUO_SEED.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import requests
import sqlalchemy as sa

from perpetuo.db import Database
from perpetuo.gateway.audit import differences, open_rows
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.sweep import Sweep
from perpetuo.models import RequestLog
from tests.serving import Serving

CLIENTS = 8


@dataclass
class Received:
    """What one client got of one answer."""

    request_id: str
    status: int
    is_whole: bool
    said: str


@dataclass
class Load:
    """Clients that ask without pause until told to stop, each with a random stream of its own."""

    url: str
    headers: dict[str, str]
    seed: int
    received: list[Received] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # answers that belong to another's question
    lost: int = 0
    is_over: bool = False

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        chance = random.Random(f"{self.seed}/{number}")
        with requests.Session() as session:
            for turn in range(1_000_000):
                if self.is_over:
                    return
                try:
                    self._one(session, chance, f"client {number} turn {turn}")
                except (requests.RequestException, OSError):
                    self.lost += 1
                    time.sleep(0.005)

    def _one(self, session: requests.Session, chance: random.Random, text: str) -> None:
        kind = chance.choices(["plain", "stream", "leave", "refused"], [5, 4, 1, 1])[0]
        body = {
            "model": "gpt-4o",
            "messages": [{"role": "user", "content": text}],
            "stream": kind in ("stream", "leave"),
        }
        if kind == "refused":
            body["messages"] = []
        with session.post(
            f"{self.url}/v1/chat/completions", json=body, headers=self.headers, stream=True, timeout=60
        ) as response:
            answer = Received(response.headers.get("x-request-id", ""), response.status_code, False, kind)
            if response.status_code == 200 and body["stream"]:
                self._read_stream(response, answer, text, leaves=kind == "leave")
            elif response.status_code == 200:
                self.received.append(answer)
                said = response.json()["choices"][0]["message"]["content"]
                answer.is_whole = True
                self._compare(said, text)
            else:
                assert response.json()["error"]["type"], response.text

    def _read_stream(self, response: requests.Response, answer: Received, text: str, *, leaves: bool) -> None:
        said, is_counted = "", False
        for line in response.iter_lines():
            if not line.startswith(b"data: "):
                continue
            if not is_counted:
                self.received.append(answer)
                is_counted = True
            if line == b"data: [DONE]":
                answer.is_whole = True
                self._compare(said, text)
                return
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return
            said += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if leaves:
                return

    def _compare(self, said: str, text: str) -> None:
        if text not in said:
            self.faults.append(f"asked {text!r}, was told {said!r}")


def endure(
    server: Serving,
    headers: dict[str, str],
    seed: int,
    seconds: float,
    strike: Callable[[random.Random], None],
) -> Load:
    """Load for `seconds`, a strike every fifth to full second; returns what the clients received."""
    print(f"seed {seed}: replay with PERPETUO_SEED={seed}")
    chance = random.Random(f"{seed}/strikes")
    with Load(server.url, headers, seed) as load:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(chance.uniform(0.2, 1.0))
            strike(chance)
    return load


def judge(database: Database, load: Load) -> None:
    """After the server has ended: sweeps, then compares what was received with the books."""
    ledger = Ledger(database)
    try:
        swept = Sweep(ledger, 0).look()
        assert open_rows(database) == 0, "rows stay open after the sweep"
        before = _rows(database)
        assert Sweep(ledger, 0).look() == 0, "a second sweep found more"
        assert _rows(database) == before, "a second sweep changed something"
    finally:
        ledger.close()
    whole = [answer for answer in load.received if answer.is_whole]
    print(f"{len(whole)} whole answers of {len(load.received)}, {load.lost} lost, {swept} swept")
    assert load.faults == []
    assert len(whole) > 20, "too little load to prove anything"
    ids = [answer.request_id for answer in load.received]
    assert len(set(ids)) == len(ids), "two answers share an id"
    assert [a for a in load.received if a.request_id not in before] == [], "an answer without its row"
    unsettled = [a for a in whole if before[a.request_id] not in ("ok", "client_closed")]
    assert unsettled == [], "an answer received in full without its settled row"
    assert differences(database) == []


def _rows(database: Database) -> dict[str, str]:
    statement = sa.select(RequestLog.id, RequestLog.status)
    return dict(list(database.read(lambda c: c.execute(statement).all(), 30)))
