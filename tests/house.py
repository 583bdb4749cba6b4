"""A whole installation for a module of tests: the real server on a database of its own, and a hand on both.

A test module imports the fixture `house`; each of its tests has its own workspace and upstream.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import sqlalchemy as sa

from perpetuo.config import load
from perpetuo.gateway.walk import Gateway
from perpetuo.models import RequestLog
from tests.balance import books_balance
from tests.conftest import BACKENDS, migrate
from tests.fake_upstream import FakeUpstream
from tests.serving import Serving, wait_until
from tests.tenants import Tenant, new_tenant

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Say hello"}]}
NUMBERS = itertools.count()
LOGS = RequestLog.__table__


class House:
    """`gateway` reads and writes the same database from the tests' process."""

    def __init__(self, database_url: str, folder: Path, **settings: str) -> None:
        settings = {"PERPETUO_ORPHAN_GRACE": "0", **settings}
        self.server = Serving(database_url, folder, workers=1, **settings)
        self.gateway = Gateway(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(folder)}))

    def __enter__(self) -> House:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.gateway.close()

    def tenant(self, upstream: FakeUpstream, **api_key: Any) -> Tenant:
        tenant = new_tenant(self.gateway)
        tenant.add_provider_key(upstream.base_url)
        if api_key:
            tenant.add_api_key(**api_key)
        return tenant

    def post(self, tenant: Tenant, *, path: str = "/v1/chat/completions", **fields: Any) -> requests.Response:
        """A call through a client that reads its answer when it likes, if it is a stream."""
        return requests.post(
            f"{self.server.url}{path}",
            json={**CHAT, **fields},
            headers=tenant.headers,
            stream=bool(fields.get("stream")),
            timeout=30,
        )

    def raw(self, request: bytes) -> bytes:
        """The answer to these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def rows(self, tenant: Tenant) -> list[Any]:
        statement = sa.select(LOGS).where(LOGS.c.workspace_id == tenant.workspace_id).order_by(LOGS.c.id)
        return list(self.gateway.database.read(lambda c: c.execute(statement).mappings().all()))

    def settled(self, tenant: Tenant, count: int = 1) -> list[Any]:
        """The rows of this workspace, once there are so many and none is open."""

        def are_settled() -> bool:
            rows = self.rows(tenant)
            return len(rows) >= count and all(row["status"] != "open" for row in rows)

        wait_until(are_settled, explain=lambda: str([row["status"] for row in self.rows(tenant)]))
        books_balance(self.gateway.database)
        return self.rows(tenant)


class Visitor:
    """A client on a bare socket, that can leave in the middle of anything."""

    def __init__(self, house: House, tenant: Tenant, **fields: Any) -> None:
        body = json.dumps({**CHAT, **fields}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {tenant.key}\r\n\r\n"
        )
        self.socket = socket.create_connection(("127.0.0.1", house.server.port), timeout=10)
        self.socket.sendall(head.encode() + body)
        self.received = b""

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            received = self.socket.recv(65536)
            assert received, f"the server closed: {self.received!r}"
            self.received += received
        return self.received

    def leave(self, *, with_reset: bool = False) -> None:
        if with_reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def new_database(request: pytest.FixtureRequest, backend: str, folder: Path) -> str:
    """The URL of a migrated database for longer than one test."""
    if backend == "sqlite":
        url = f"sqlite:///{folder}/house.db"
    else:
        server = request.getfixturevalue("server")
        url = server.create_database(f"house_{os.getpid()}_{next(NUMBERS)}")
    migrate(url, folder)
    return url


@pytest.fixture(scope="module", params=BACKENDS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with House(new_database(request, request.param, folder), folder) as built:
        yield built
