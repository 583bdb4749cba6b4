"""The real server for a test: gunicorn with its own configuration, as an operator starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).parent.parent
START_SECONDS = 20.0


class Serving:
    """`with Serving(database_url, folder) as server:` starts it migrated; `.url` is where it answers."""

    def __init__(
        self, database_url: str, folder: Path, *, workers: int = 2, root: Path = ROOT, **settings: str
    ) -> None:
        self.folder = folder
        self.root = root  # whose code runs: the benchmark serves another checkout as well
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"server-{self.port}.log"
        self.environ = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": database_url,
            "PERPETUO_DATA": str(folder),
            "PORT": str(self.port),
            "WEB_CONCURRENCY": str(workers),
            **settings,
        }
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "wsgi:app"],
                cwd=self.root,
                env=self.environ,
                stdout=log,
                stderr=log,
            )
        wait_until(self.is_up, START_SECONDS, lambda: self.log)

    def is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        try:
            return requests.get(f"{self.url}/healthz", timeout=1).status_code == 200
        except requests.RequestException:
            return False

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def workers(self) -> list[int]:
        """The process ids of the workers that live."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]

    def kill_worker(self, number: int = 0) -> int:
        """kill -9 for one of the workers; the master starts another."""
        pid = self.workers()[number]
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """kill -9 for everything at once, as a machine that loses its power."""
        assert self.process is not None
        for pid in [self.process.pid, *self.workers()]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            for process in (self.process, *children):
                process.kill()
            self.process.wait()


def wait_until(
    condition: Callable[[], object], seconds: float = 10.0, explain: Callable[[], str] = str
) -> None:
    """Waits for a condition, never for a time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {explain()}"
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
