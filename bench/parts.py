"""The parts of a run. Each gives a row for each peer, round and load, with the figures that it saw."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from bench import streams as stream_clients
from bench.ground import Ground
from bench.load import Calls, drive, request_bytes
from bench.peers import PLAIN_MODEL, STREAM_MODEL, Gateway, Peer, Tree, chat_body
from bench.report import Row

WORKERS = 2


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    connections: list[int]
    streams: list[int]
    rounds: int
    seconds: int  # of each burst of plain calls
    chunks: int  # of each stream
    starts: int
    requests: int  # before memory is looked at


def in_turn(peers: list[Peer], rounds: int) -> Iterator[tuple[int, Peer]]:
    """Round after round every peer, each round in the opposite order, so that a drift favours nobody."""
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            yield number, peer


def plain(ground: Ground, plan: Plan) -> Iterator[Row]:
    """Whole answers, the upstream answering at once."""
    with ground.all_running() as peers:
        for peer in peers:
            _burst(ground, peer, 16, 1)  # pools filled, code warm
        for connections in plan.connections:
            for number, peer in in_turn(peers, plan.rounds):
                row = _plain_row(ground, peer, connections, plan.seconds)
                yield {"peer": peer.name, "load": connections, "round": number, **row}


def _plain_row(ground: Ground, peer: Peer, connections: int, seconds: int) -> Row:
    before = [_cpu(peer.pid), _cpu(peer.database_pid)]
    calls = _burst(ground, peer, connections, seconds)
    spent = [_cpu(peer.pid) - before[0], _cpu(peer.database_pid) - before[1]]
    row = {"req/s": calls.requests / calls.seconds, "p50 ms": calls.p50_ms, "p99 ms": calls.p99_ms}
    if peer.pid:
        costs = [1000 * seconds / max(calls.requests, 1) for seconds in (*spent, sum(spent))]
        row |= dict(zip(("cpu ms", "pg ms", "both ms"), costs, strict=True))
    return {**row, "failed": calls.failed}


def _burst(ground: Ground, peer: Peer, connections: int, seconds: int) -> Calls:
    body = chat_body(PLAIN_MODEL)
    return drive(peer.plain_url, peer.headers, body, connections, seconds, ground.folder)


def _cpu(pid: int | None) -> float:
    return Tree(pid).cpu_seconds() if pid else 0.0


def streams(ground: Ground, plan: Plan) -> Iterator[Row]:
    """Streams at once, a chunk each 100 ms."""
    with ground.all_running() as peers, stream_clients.clients() as clients:
        for streams in plan.streams:
            for number, peer in in_turn(peers, plan.rounds):
                row = _stream_row(ground, clients, peer, streams, plan.chunks)
                yield {"peer": peer.name, "load": streams, "round": number, **row}


def _stream_row(ground: Ground, clients: ProcessPoolExecutor, peer: Peer, streams: int, chunks: int) -> Row:
    body = chat_body(STREAM_MODEL, stream=True, max_tokens=chunks)
    request = request_bytes(peer.stream_url, peer.headers, body)
    trees = [Tree(pid) if pid else None for pid in (peer.pid, ground.upstream_pid)]
    jobs = stream_clients.jobs(peer.stream_url, request, streams, chunks)
    futures = [clients.submit(stream_clients.follow, job) for job in jobs]
    begin, end = jobs[0].steady
    before, after = (_cpu_at(moment, trees) for moment in (begin, end))
    seen = stream_clients.together(future.result() for future in futures)
    own, generator = (late - early for early, late in zip(before, after, strict=True))
    row: Row = {"complete": seen.complete, "failed": streams - seen.complete}
    for heading, times in (("p{} ms", seen.delays_ms), ("1st p{}", seen.first_ms)):
        row |= {heading.format(percent): quantile(times, percent) for percent in (50, 99)}
    row["busy %"] = 100 * max(seen.busy, generator / (end - begin))
    if peer.pid:
        row["µs/chunk"] = 1e6 * own / max(seen.steady_chunks, 1)
    if seen.problem:
        ground.note(f"{peer.name}, {streams} streams: {seen.problem!r}")
    return row


def _cpu_at(moment: float, trees: list[Tree | None]) -> list[float]:
    time.sleep(max(0.0, moment - time.monotonic()))
    return [tree.cpu_seconds() if tree else 0.0 for tree in trees]


def quantile(values: list[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100] if values else float("nan")


def start(ground: Ground, plan: Plan) -> Iterator[Row]:
    """From the command to the first 200 of /healthz, on a migrated database."""
    for number in range(plan.starts):
        for gateway in ground.gateways:
            row = {"peer": gateway.name, "load": WORKERS, "round": number, "failed": 0}
            yield {**row, "start s": _seconds_to_start(gateway)}


def _seconds_to_start(gateway: Gateway) -> float:
    begun = time.monotonic()
    with gateway.server():
        return time.monotonic() - begun


def memory(ground: Ground, plan: Plan) -> Iterator[Row]:
    """Resident memory of a fresh server's processes: idle, after the requests, after half as many more."""
    for gateway in ground.gateways:
        with gateway.running(ground.bases) as peer:
            row = {"peer": gateway.name, "load": plan.requests, "round": 0, "failed": 0}
            row["at first"] = _rss_mib(peer)
            for key, count in (("after n", plan.requests), ("after 1.5 n", plan.requests // 2)):
                row["failed"] += _send(ground, peer, count)
                row[key] = _rss_mib(peer)
        row["growth"] = row["after 1.5 n"] - row["after n"]
        yield row


def _send(ground: Ground, peer: Peer, count: int) -> int:
    """At least so many calls, in bursts since wrk counts seconds; gives how many failed."""
    failed = 0
    while count > 0:
        calls = _burst(ground, peer, 64, 5 if count > 20_000 else 1)
        failed += calls.failed
        count -= max(calls.requests, 1)
    return failed


def _rss_mib(peer: Peer) -> float:
    assert peer.pid is not None
    return Tree(peer.pid).rss_mib()
