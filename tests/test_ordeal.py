import os
import random

import pytest
from sqlalchemy.engine import make_url

from perpetuo import create_app
from perpetuo.config import load
from tests import postgres
from tests.conftest import migrate
from tests.fake_upstream import FakeUpstream, auto
from tests.fault_proxy import FaultProxy
from tests.ordeal import endure, judge
from tests.serving import Serving
from tests.tenants import new_tenant

SEEDS = [int(os.environ["PERPETUO_SEED"])] if "PERPETUO_SEED" in os.environ else [1, 2]
MANY_SEEDS = SEEDS if "PERPETUO_SEED" in os.environ else range(100, 112)
SECONDS, MANY_SECONDS = 5.0, 12.0


def put_through(database_url, folder, seed, seconds, strike_at, served_url=None):
    """One ordeal from the first row to the verdict; `strike_at(server)` gives the blow."""
    app = create_app(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(folder)}))
    gateway = app.extensions["perpetuo"]
    try:
        with FakeUpstream(reply=auto(echo=True, delay=0.004)) as upstream:
            tenant = new_tenant(gateway)
            tenant.add_provider_key(upstream.base_url)
            with Serving(served_url or database_url, folder) as server:
                load_ = endure(server, tenant.headers, seed, seconds, strike_at(server))
        judge(gateway.database, load_)
    finally:
        gateway.close()


def killing_workers(server):
    def strike(chance: random.Random) -> None:
        if chance.random() < 0.2:
            server.kill()
            server.start()
        elif workers := server.workers():
            server.kill_worker(chance.randrange(len(workers)))

    return strike


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_workers_lose_nothing(database_url, tmp_path, seed):
    put_through(database_url, tmp_path, seed, SECONDS, killing_workers)


@pytest.mark.torture
@pytest.mark.parametrize("seed", MANY_SEEDS)
def test_workers_killed_for_long_lose_nothing(database_url, tmp_path, seed):
    put_through(database_url, tmp_path, seed, MANY_SECONDS, killing_workers)


@pytest.fixture(scope="module")
def durable():
    """A PostgreSQL of its own, to be killed."""
    server = postgres.start(durable=True, tcp=True)
    yield server
    server.stop()


@pytest.fixture
def durable_url(durable, tmp_path, request):
    name = f"ordeal_{abs(hash(request.node.nodeid)) % 10**9}"
    url = durable.create_database(name)
    migrate(url, tmp_path)
    yield url
    durable.drop_database(name)


def killing_postgresql(durable):
    def strike(chance: random.Random) -> None:
        durable.kill()
        durable.start_again()

    return lambda server: strike


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_postgresql_loses_nothing(durable, durable_url, tmp_path, seed):
    put_through(durable_url, tmp_path, seed, SECONDS, killing_postgresql(durable))


@pytest.mark.torture
@pytest.mark.parametrize("seed", MANY_SEEDS)
def test_a_postgresql_killed_often_loses_nothing(durable, durable_url, tmp_path, seed):
    put_through(durable_url, tmp_path, seed, MANY_SECONDS, killing_postgresql(durable))


def cut_at_commits(durable, durable_url, folder, seed, seconds):
    with FaultProxy(durable.address) as proxy:

        def strike(chance: random.Random) -> None:
            proxy.cut_at_commit(before=chance.random() < 0.5, times=chance.randint(1, 3))

        served = durable.tcp_url(make_url(durable_url).database, proxy.address)
        put_through(durable_url, folder, seed, seconds, lambda server: strike, served)
        assert proxy.commits_cut > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_connections_cut_at_commit_lose_nothing(durable, durable_url, tmp_path, seed):
    cut_at_commits(durable, durable_url, tmp_path, seed, SECONDS)


@pytest.mark.torture
@pytest.mark.parametrize("seed", MANY_SEEDS)
def test_connections_cut_at_commit_for_long_lose_nothing(durable, durable_url, tmp_path, seed):
    cut_at_commits(durable, durable_url, tmp_path, seed, MANY_SECONDS)
