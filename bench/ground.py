"""Everything that a run needs, started once and ended together: upstreams, nginx, databases, checkouts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import peers
from bench.peers import Gateway, Peer
from tests import postgres
from tests.serving import ROOT, wait_until


@dataclass
class Ground:
    """The peers that always run, and the gateways that a part starts for itself."""

    folder: Path
    upstream_pid: int
    bases: dict[str, str]
    fixed: list[Peer] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    with_limits: bool = False

    def note(self, text: str) -> None:
        """Something that the reader of the figures must know; said once."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def all_running(self) -> Iterator[list[Peer]]:
        """Every peer, the gateways started anew."""
        with ExitStack() as stack:
            running = [stack.enter_context(gateway.running(self.bases)) for gateway in self.gateways]
            if self.with_limits:
                running += [peers.limited(peer, self.bases) for peer in running]
            yield [*self.fixed, *running]


@contextmanager
def prepared(backends: list[str], base: str | None, *, with_limits: bool = False) -> Iterator[Ground]:
    """Starts and migrates; takes down all that it started, however the run ends."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perpetuo-bench-")))
        folder.chmod(0o755)  # nginx's worker is another user where we are root
        own, upstream_pid = stack.enter_context(peers.own_upstream())
        ground = Ground(folder, upstream_pid, {}, with_limits=with_limits)
        _start_fixed(ground, stack, own)
        roots = {"gateway": ROOT}
        if base:
            roots["base"] = peers.checkout(base, folder / "base")
            if (roots["base"] / "requirements.txt").read_text() != (ROOT / "requirements.txt").read_text():
                ground.note("BASE asks for other requirements; it was measured with ours")
        server = None
        if "postgresql" in backends:
            server = postgres.start(durable=True)
            stack.callback(server.stop)
        for backend in backends:
            for name, root in roots.items():
                try:
                    ground.gateways.append(_made(name, root, backend, folder, server))
                except RuntimeError as exc:  # an older commit need not know what we ask of it
                    ground.note(f"left out: {exc}")
        yield ground


def _start_fixed(ground: Ground, stack: ExitStack, own: str) -> None:
    """The direct upstream, and nginx before it where there is one."""
    path, plain = "/v1/chat/completions", own
    if peers.NGINX:
        fixed, pass_plain, pass_stream = peers.free_ports(3)
        plain = f"127.0.0.1:{fixed}"
        stack.enter_context(peers.nginx(ground.folder / "upstream", peers.fixed_server(fixed)))
        servers = peers.passing_server(pass_plain, plain) + peers.passing_server(pass_stream, own)
        pid = stack.enter_context(peers.nginx(ground.folder / "passing", servers))
        for port in (fixed, pass_plain, pass_stream):
            wait_until(partial(peers.is_open, port))
        urls = (f"http://127.0.0.1:{port}{path}" for port in (pass_plain, pass_stream))
        ground.fixed.append(Peer("nginx", *urls, pid=pid))
    else:
        ground.note("nginx is missing: the bundled upstream answers, and there is no pass-through")
    ground.fixed.insert(0, Peer("direct", f"http://{plain}{path}", f"http://{own}{path}"))
    ground.bases = {peers.PLAIN_MODEL: f"http://{plain}/v1", peers.STREAM_MODEL: f"http://{own}/v1"}


def _made(
    name: str, root: Path, backend: str, folder: Path, server: postgres.PostgresServer | None
) -> Gateway:
    own_folder = folder / f"{name}-{backend}"
    own_folder.mkdir()
    url, database_pid = f"sqlite:///{own_folder}/perpetuo.db", None
    if backend == "postgresql":
        assert server is not None
        url, database_pid = server.create_database(f"bench_{name}"), peers.postmaster_pid(server)
    gateway = Gateway(f"{name} {backend}", root, own_folder, url, database_pid)
    print(f"migrating {gateway.name}", file=sys.stderr)
    gateway.migrate()
    return gateway
