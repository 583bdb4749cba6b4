"""What is measured: the upstream itself, nginx that passes through to it, this gateway, and another commit's.

A gateway is set up as an operator would: migrated by its command, and filled over its HTTP contract.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import requests

from bench import upstream
from tests import postgres
from tests.serving import ROOT, Serving

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
PLAIN_MODEL, STREAM_MODEL = "gpt-4o", upstream.MODEL


class Tree:
    """A process and all that it started."""

    def __init__(self, root: int) -> None:
        process = psutil.Process(root)
        self.processes = [process, *process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time, that of children already gone included: it falls to their parent."""
        total = 0.0
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])
        return total

    def rss_mib(self) -> float:
        return sum(process.memory_info().rss for process in self.processes) / 2**20


@dataclass
class Peer:
    """Something that answers chat completions; `pid` and `database_pid` are the roots of its processes."""

    name: str
    plain_url: str
    stream_url: str
    headers: dict[str, str] = field(default_factory=dict)
    pid: int | None = None
    database_pid: int | None = None


@dataclass
class Gateway:
    """A checkout with a migrated database of its own, not yet running."""

    name: str
    root: Path
    folder: Path
    database_url: str
    database_pid: int | None

    def server(self) -> Serving:
        return Serving(self.database_url, self.folder, root=self.root)

    def migrate(self) -> None:
        command = [sys.executable, "-m", "flask", "--app", "wsgi", "db", "upgrade"]
        environ = self.server().environ
        done = subprocess.run(command, cwd=self.root, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}, since it does not migrate: {done.stderr.strip()}")

    @contextmanager
    def running(self, bases: dict[str, str]) -> Iterator[Peer]:
        """Serves it, with a fresh workspace whose provider keys lead to `bases` (model to base URL)."""
        with self.server() as server:
            assert server.process is not None
            url = f"{server.url}/v1/chat/completions"
            headers = {"Authorization": f"Bearer {_new_key(server.url, bases)}"}
            yield Peer(self.name, url, url, headers, server.process.pid, self.database_pid)


def limited(peer: Peer, bases: dict[str, str]) -> Peer:
    """The same server, asked with a key that has a budget and both limits, all beyond reach."""
    url = peer.plain_url.removesuffix("/v1/chat/completions")
    limits = {"budget_usd": 1_000_000, "rpm_limit": 10**9, "tpm_limit": 10**9}
    headers = {"Authorization": f"Bearer {_new_key(url, bases, **limits)}"}
    return replace(peer, name=f"{peer.name}, limits", headers=headers)


def _new_key(url: str, bases: dict[str, str], **limits: int) -> str:
    """An API key whose models are served by these upstreams, made as a program would make it."""
    account = {"email": f"bench-{time.time_ns()}@example.com", "password": os.urandom(12).hex()}
    signed_up = _post(f"{url}/auth/signup", account, "")
    workspace = f"{url}/workspaces/{signed_up['workspace']['id']}"
    for model, base_url in bases.items():
        key = {"provider": "openai", "api_key": "sk-bench", "base_url": base_url, "models": [model]}
        _post(f"{workspace}/providers", key, signed_up["token"])
    return _post(f"{workspace}/api-keys", {"name": "bench", **limits}, signed_up["token"])["key"]


def _post(url: str, body: dict, token: str) -> dict:
    headers = {"Authorization": f"Bearer {token}"} if token else {"Accept": "application/json"}
    answer = requests.post(url, json=body, headers=headers, timeout=30)
    if answer.status_code != 201:
        raise RuntimeError(f"{url} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()


@contextmanager
def own_upstream() -> Iterator[tuple[str, int]]:
    """The bundled upstream's address and process id."""
    command = [sys.executable, "-m", "bench.upstream"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.terminate()


@contextmanager
def nginx(folder: Path, servers: str) -> Iterator[int]:
    """Runs nginx with these `server` and `upstream` blocks; gives its process id."""
    assert NGINX is not None
    folder.mkdir()
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"worker_processes 1; worker_rlimit_nofile 16384; pid {folder}/pid; daemon off;"
        "events { worker_connections 8192; }"
        f"http {{ access_log off; keepalive_requests 100000000; {temporary} {servers} }}"
    )
    command = [NGINX, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf", "-p", str(folder)]
    with subprocess.Popen(command) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def fixed_server(port: int) -> str:
    """An upstream that answers at once, always the same."""
    reply = f"default_type application/json; return 200 '{upstream.completion()}';"
    return f"server {{ listen 127.0.0.1:{port}; location / {{ {reply} }} }}"


def passing_server(port: int, address: str) -> str:
    """A plain pass-through with kept connections and without buffering, as one sets it up for streams."""
    keep = f"upstream to{port} {{ server {address}; keepalive 1024; keepalive_requests 100000000; }}"
    way = f'proxy_pass http://to{port}; proxy_http_version 1.1; proxy_set_header Connection "";'
    return f"{keep} server {{ listen 127.0.0.1:{port}; location / {{ {way} proxy_buffering off; }} }}"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def checkout(commit: str, folder: Path) -> Path:
    """The tree of another commit. An archive, not a worktree: nothing stays in .git if we are killed."""
    archive = folder.with_suffix(".zip")
    command = ["git", "archive", "--output", str(archive), commit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"BASE={commit}: {done.stderr.strip()}")
    shutil.unpack_archive(archive, folder)
    return folder


def postmaster_pid(server: postgres.PostgresServer) -> int:
    """The process whose children serve the connections."""
    with closing(postgres.connect(server.url("postgres"))) as connection, connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return psutil.Process(cursor.fetchone()[0]).ppid()


def chat_body(model: str, **fields: object) -> bytes:
    """A request of some 600 bytes."""
    messages = [
        {"role": "system", "content": "You are helpful. " * 10},
        {"role": "user", "content": "Say hello " * 30},
    ]
    return json.dumps({"model": model, "messages": messages, **fields}).encode()
