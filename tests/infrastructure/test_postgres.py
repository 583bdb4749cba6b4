"""The PostgreSQL of the test run starts, is killed, paused and stopped without a trace."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import pytest

from tests import postgres
from tests.postgres import PostgresError


@pytest.fixture(scope="module")
def server():
    server = postgres.start(durable=True)
    yield server
    server.stop()


def run(url, statement):
    with closing(postgres.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else None


def test_databases_are_made_from_a_template_and_dropped_while_in_use(server):
    template = server.create_database("template_one")
    run(template, "CREATE TABLE notes AS SELECT 1 AS id")
    copy = server.create_database("copy_one", template="template_one")
    with closing(postgres.connect(copy)):
        assert run(copy, "SELECT id FROM notes") == [(1,)]
        server.drop_database("copy_one")
    with pytest.raises(psycopg2.OperationalError, match="does not exist"):
        run(copy, "SELECT 1")


def test_settings_are_those_asked_for(server):
    url = server.url("postgres")
    assert run(url, "SHOW fsync") == [("on",)]
    assert run(url, "SHOW max_connections") == [("200",)]
    with pytest.raises(PostgresError, match="tcp=True"):
        _ = server.address


def test_killed_server_keeps_what_was_committed(server):
    url = server.create_database("killed")
    run(url, "CREATE TABLE notes AS SELECT 1 AS id")
    with closing(postgres.connect(url)) as unfinished:
        unfinished.cursor().execute("INSERT INTO notes VALUES (2)")
        server.kill()
        with pytest.raises(psycopg2.OperationalError):
            run(url, "SELECT 1")
        with pytest.raises(psycopg2.OperationalError):
            unfinished.commit()
    server.start_again()
    assert run(url, "SELECT id FROM notes") == [(1,)]


def test_paused_server_answers_only_when_resumed(server):
    answers = []
    with closing(postgres.connect(server.url("postgres"))) as connection:
        asking = threading.Thread(target=lambda: answers.append(connection.cursor().execute("SELECT 1")))
        server.pause()
        asking.start()
        asking.join(timeout=0.2)
        assert asking.is_alive()
        assert answers == []
        server.resume()
        asking.join(timeout=10)
        assert answers == [None]


def test_stop_leaves_no_process_and_no_file_even_while_paused():
    server = postgres.start()
    directory = server._cluster.directory
    server.pause()
    server.stop()
    server.stop()
    assert not directory.exists()
    assert processes_on(directory) == []


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_leaves_no_process_and_no_file(ending):
    code = (
        "from tests import postgres; import time; server = postgres.start();"
        "print(server._cluster.directory, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        directory = Path(process.stdout.readline().strip())
        assert processes_on(directory)
        process.send_signal(ending)
    deadline = time.monotonic() + 15
    while (directory.exists() or processes_on(directory)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_on(directory) == []
    assert not directory.exists()


def test_directory_with_something_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis").write_text("precious")
    with pytest.raises(PostgresError, match="not empty"):
        postgres.start(tmp_path)
    assert (tmp_path / "thesis").read_text() == "precious"


def test_server_that_does_not_start_tells_why(tmp_path):
    with pytest.raises(PostgresError, match="no_such_setting"):
        postgres.start(tmp_path / "cluster", settings={"no_such_setting": "1"})
    assert not (tmp_path / "cluster").exists()


def test_binaries_out_of_reach_are_copied(monkeypatch):
    monkeypatch.setattr(postgres._Cluster, "_can_run_binaries", lambda cluster: False)
    server = postgres.start()
    assert run(server.url("postgres"), "SELECT 1") == [(1,)]
    server.stop()


def test_foreign_server_is_used_but_not_killed(server, monkeypatch):
    monkeypatch.setenv("TEST_DATABASE_URL", server.url("postgres").replace("://", "+psycopg2://"))
    foreign = postgres.start()
    url = foreign.create_database("foreign")
    assert run(url, "SELECT current_database()") == [("foreign",)]
    foreign.drop_database("foreign")
    foreign.stop()
    with pytest.raises(PostgresError, match="TEST_DATABASE_URL"):
        foreign.kill()


def processes_on(directory):
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_dead = process.info["status"] == psutil.STATUS_ZOMBIE
        if not is_dead and f"{directory}/data" in (process.info["cmdline"] or []):
            found.append(process)
    return found
