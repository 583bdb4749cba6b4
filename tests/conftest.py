"""What every test stands on: a migrated application on SQLite and on PostgreSQL, and a real upstream.

Each test gets a database of its own or an emptied one, built by the migrations. `PERPETUO_TEST_BACKENDS`
may name one of the two for a quick run; the suite as a whole runs both.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from flask import Flask
from flask_migrate import upgrade

from perpetuo import create_app
from perpetuo.config import Settings, load
from perpetuo.gateway.walk import Gateway
from tests import postgres
from tests.fake_upstream import FakeUpstream

BACKENDS = os.environ.get("PERPETUO_TEST_BACKENDS", "sqlite,postgresql").split(",")
NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.PostgresServer]:
    running = postgres.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By backend the migrated database: SQLite's is copied, PostgreSQL's emptied after each test."""
    return {}


def migrate(database_url: str, folder: Path) -> None:
    app = create_app(load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(folder)}))
    with app.app_context():
        upgrade()
    app.extensions["perpetuo"].close()


@pytest.fixture(params=BACKENDS)
def database_url(
    request: pytest.FixtureRequest,
    templates: dict[str, str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A fresh, migrated database."""
    if request.param == "sqlite":
        if "sqlite" not in templates:
            folder = tmp_path_factory.mktemp("template")
            migrate(f"sqlite:///{folder}/template.db", folder)
            templates["sqlite"] = str(folder / "template.db")
        shutil.copy(templates["sqlite"], tmp_path / "test.db")
        yield f"sqlite:///{tmp_path}/test.db"
        return
    server: postgres.PostgresServer = request.getfixturevalue("server")
    if "postgresql" not in templates:
        name = f"test_{os.getpid()}_{next(NUMBERS)}"
        templates["postgresql"] = server.create_database(name)
        migrate(templates["postgresql"], tmp_path_factory.mktemp("template"))
    url = templates["postgresql"]
    yield url
    if not emptied(url):
        del templates["postgresql"]  # something still holds it: the next test gets another


def emptied(url: str) -> bool:
    """Empties a database, which takes a two-hundredth of the time that a fresh one takes."""
    with closing(postgres.connect(url, options="-c lock_timeout=2000")) as connection:
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute("delete from request_logs; delete from usage_counters; delete from users")
        except psycopg2.Error:
            return False
    return True


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return load({"DATABASE_URL": database_url, "PERPETUO_DATA": str(tmp_path), "PERPETUO_ORPHAN_GRACE": "0"})


@pytest.fixture
def app(settings: Settings) -> Iterator[Flask]:
    app = create_app(settings)
    app.testing = True
    yield app
    app.extensions["perpetuo"].close()


@pytest.fixture
def gateway(app: Flask) -> Gateway:
    return app.extensions["perpetuo"]


@pytest.fixture
def client(app: Flask):
    return app.test_client()


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """A test that leaves a thread behind fails: it would disturb the next, and the product would leak it."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(2)
    left = [thread.name for thread in left if thread.is_alive()]
    assert not left, f"threads still run: {left}"
