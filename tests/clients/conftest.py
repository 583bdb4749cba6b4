"""The real server for a module's tests, with an upstream behind it; each test gets a workspace of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from openai import OpenAI

from perpetuo.config import load
from perpetuo.gateway.walk import Gateway
from perpetuo.models import RequestLog
from tests.conftest import BACKENDS, migrate
from tests.fake_upstream import FakeUpstream, auto
from tests.serving import Serving, wait_until
from tests.tenants import Tenant, new_tenant

MAX_BODY_BYTES = 200_000
NUMBERS = itertools.count()
Row = Mapping[str, Any]


@dataclass
class Site:
    """A running server, the fake upstream, and a gateway of this process on the same database."""

    server: Serving
    upstream: FakeUpstream
    gateway: Gateway

    @property
    def base_url(self) -> str:
        return f"{self.server.url}/v1"


@pytest.fixture(scope="module", params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    database_url = f"sqlite:///{folder}/test.db"
    if request.param == "postgresql":
        name = f"clients_{os.getpid()}_{next(NUMBERS)}"
        database_url = request.getfixturevalue("server").create_database(name)
    migrate(database_url, folder)
    limits = {"PERPETUO_MAX_BODY_BYTES": str(MAX_BODY_BYTES), "PERPETUO_FIRST_BYTE_TIMEOUT": "2"}
    gateway = Gateway(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(folder)}))
    with Serving(database_url, folder, **limits) as server, FakeUpstream() as upstream:
        yield Site(server, upstream, gateway)
    gateway.close()
    if request.param == "postgresql":
        request.getfixturevalue("server").drop_database(name)


@pytest.fixture
def upstream(site: Site) -> Iterator[FakeUpstream]:
    """The module's upstream, as new; its connections, which the server keeps, end with the test."""
    yield site.upstream
    site.upstream.close_connections()
    site.upstream.script([])
    site.upstream.reply = auto()
    site.upstream.requests.clear()


@pytest.fixture
def tenant(site: Site, upstream: FakeUpstream) -> Tenant:
    tenant = new_tenant(site.gateway)
    tenant.add_provider_key(upstream.base_url)
    return tenant


@pytest.fixture(scope="module")
def any_client(site: Site) -> Iterator[OpenAI]:
    with OpenAI(base_url=site.base_url, api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture
def client(any_client: OpenAI, tenant: Tenant) -> OpenAI:
    """The official client, on the module's connections."""
    return any_client.with_options(api_key=tenant.key)


@pytest.fixture
def rows(site: Site, tenant: Tenant) -> Callable[..., list[Row]]:
    """The workspace's rows, oldest first, once there are that many and all are settled."""
    table = RequestLog.__table__
    statement = sa.select(table).where(table.c.workspace_id == tenant.workspace_id)

    def rows(count: int = 1) -> list[Row]:
        found: list[Row] = []

        def are_settled() -> bool:
            ordered = statement.order_by(table.c.created_at, table.c.id)
            found[:] = site.gateway.database.read(lambda c: c.execute(ordered).mappings().all())
            return len(found) >= count and all(row["status"] != "open" for row in found)

        wait_until(are_settled, explain=lambda: str([dict(row) for row in found]))
        assert len(found) == count
        return found

    return rows
