"""The proxy loses connections and commits exactly where it says, before a real PostgreSQL."""

from __future__ import annotations

import threading
from contextlib import closing

import psycopg2
import pytest

from tests import postgres
from tests.fault_proxy import FaultProxy, _FrontendReader


@pytest.fixture(scope="module")
def server():
    server = postgres.start(tcp=True)
    yield server
    server.stop()


@pytest.fixture
def proxy(server):
    with FaultProxy(server.address) as proxy:
        yield proxy
    assert [thread.name for thread in threading.enumerate() if "FaultProxy" in thread.name] == []


@pytest.fixture
def direct_url(server):
    url = server.create_database("faults")
    with closing(postgres.connect(url)) as connection:
        connection.cursor().execute("CREATE TABLE notes (body text)")
        connection.commit()
    yield url
    server.drop_database("faults")


@pytest.fixture
def connect(server, proxy, direct_url):
    opened = []

    def connect(**options):
        opened.append(psycopg2.connect(server.tcp_url("faults", proxy.address), **options))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def insert(connection, body):
    connection.cursor().execute("INSERT INTO notes VALUES (%s)", [body])


def notes(url):
    with closing(postgres.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT body FROM notes ORDER BY body")
        return [body for (body,) in cursor]


@pytest.mark.parametrize("sslmode", ["disable", "prefer"])
def test_bytes_pass_whole_even_in_large_messages(connect, direct_url, sslmode):
    connection = connect(sslmode=sslmode)
    large = "COMMIT; " * 200_000
    insert(connection, large)
    with connection.cursor() as cursor:
        cursor.execute("SELECT body FROM notes")
        assert cursor.fetchone() == (large,)
    connection.commit()
    assert notes(direct_url) == [large]


@pytest.mark.parametrize(("before", "kept"), [(True, []), (False, ["first"])])
def test_commit_is_cut_on_either_side_of_the_server(connect, proxy, direct_url, before, kept):
    proxy.cut_at_commit(before=before)
    connection = connect()
    insert(connection, "first")
    with pytest.raises(psycopg2.OperationalError):
        connection.commit()
    proxy.wait_for_cuts(1)
    assert notes(direct_url) == kept
    another = connect()
    insert(another, "second")
    another.commit()
    assert notes(direct_url) == [*kept, "second"]
    assert (proxy.commits_seen, proxy.commits_cut) == (2, 1)


def test_commit_is_found_however_its_bytes_are_split():
    messages = [b"Q\0\0\0\x0dSELECT 1\0", b"Q\0\0\0\x0bcommit\0", b"Q\0\0\0\x0dROLLBACK\0"]
    sent = b"\0\0\0\x08\x04\xd2\x16\x2f" + b"\0\0\0\x09\0\3\0\0\0" + b"".join(messages)
    for split in range(len(sent)):
        reader = _FrontendReader()
        parts = reader.read(sent[:split])
        reader.note_answer(b"N")
        parts += reader.read(sent[split:])
        assert b"".join(part for part, _ in parts) == sent
        assert [part for part, is_commit in parts if is_commit] == [messages[1]]


def test_refused_then_served_again_on_the_same_port(connect, proxy):
    connect().cursor().execute("SELECT 1")
    proxy.refuse = True
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        connect()
    proxy.refuse = False
    connect().cursor().execute("SELECT 1")


def test_silence_keeps_the_connection_and_forwards_later(connect, proxy):
    connection = connect()
    proxy.silent = True
    asking = threading.Thread(target=lambda: connection.cursor().execute("SELECT 1"))
    asking.start()
    asking.join(timeout=0.2)
    assert asking.is_alive()
    proxy.silent = False
    asking.join(timeout=10)
    assert not asking.is_alive()


@pytest.mark.parametrize("is_silent", [False, True])
def test_cut_closes_what_is_open(connect, proxy, is_silent):
    connection = connect()
    proxy.silent = is_silent
    proxy.cut()
    with pytest.raises(psycopg2.OperationalError):
        connection.cursor().execute("SELECT 1")
    proxy.silent = False
    proxy.latency = 0.01
    connect().cursor().execute("SELECT 1")
