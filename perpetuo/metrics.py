"""GET /metrics: how this process is doing, as Prometheus text. Looks at memory only, and at no tenant.

Each scrape reaches one worker and says which: what the workers together hold, the one who asks adds up.
Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4).
"""

from __future__ import annotations

import hmac
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flask import Response
from flask.typing import ResponseReturnValue

from perpetuo import guard, web
from perpetuo.errors import Unauthenticated
from perpetuo.gateway.walk import Gateway

KIND = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Metric:
    """One number, or one for each of its labels."""

    name: str
    kind: str
    meaning: str
    values: dict[str, float]  # by further labels, '' for none


@web.blueprint.get("/metrics")
def metrics() -> ResponseReturnValue:
    """How this process is doing."""
    token = web.gateway().settings.metrics_token
    if token is not None and not hmac.compare_digest((guard.bearer() or "").encode(), token.encode()):
        error = Unauthenticated("Send PERPETUO_METRICS_TOKEN as Bearer.")
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error
    return Response(write(measure(web.gateway()), os.getpid()), content_type=KIND)


def measure(gateway: Gateway) -> list[Metric]:
    """Everything that is told of a process. Numbers that are there already: nothing is counted for this."""
    writer, pulse = gateway.ledger.writer, gateway.pulse
    pauses = {'span="process"': pulse.longest, 'span="minute"': pulse.longest_of_late()}
    return [
        _gauge("calls_in_flight", "Calls that have begun and not ended.", len(gateway.calls)),
        _gauge("draining", "1 while the process takes no new calls.", gateway.calls.is_draining),
        _gauge("ledger_rows_waiting", "Log rows that wait for a commit.", writer.waiting),
        _gauge("ledger_failing", "1 while the ledger's commits fail.", writer.failure is not None),
        _gauge(
            "upstream_connections_idle",
            "Connections to upstreams that wait for a call.",
            gateway.upstream.idle_connections,
        ),
        _connections(gateway),
        _gauge("greenlets", "Greenlets: one a client's connection, and some.", pulse.greenlets),
        Metric(
            "perpetuo_loop_longest_pause_seconds",
            "gauge",
            "How long nothing else ran, at the worst, since the process began and in the last minute.",
            pauses,
        ),
        *_of_the_system(),
    ]


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return Metric(f"perpetuo_{name}", "gauge", meaning, {"": value})


def _connections(gateway: Gateway) -> Metric:
    values: dict[str, float] = {}
    for pool, (used, opened) in gateway.database.connections().items():
        values[f'pool="{pool}",state="used"'] = used
        values[f'pool="{pool}",state="idle"'] = opened - used
    return Metric("perpetuo_database_connections", "gauge", "Pooled connections to the database.", values)


def _of_the_system() -> list[Metric]:
    """What the operating system knows of us; what it does not tell is left out."""
    seconds = time.process_time()
    found = [Metric("perpetuo_cpu_seconds_total", "counter", "Processor time used.", {"": seconds})]
    with suppress(OSError):
        count = len(os.listdir("/dev/fd")) - 1  # without the one that lists
        found.append(_gauge("open_descriptors", "Open files and sockets.", count))
    with suppress(OSError):  # Linux
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        size = pages * os.sysconf("SC_PAGE_SIZE")
        found.append(_gauge("resident_bytes", "Memory that the process holds.", size))
    return found


def write(found: list[Metric], worker: int) -> str:
    """The exposition format; each number with the label `worker`."""
    lines = []
    for metric in found:
        lines += [f"# HELP {metric.name} {metric.meaning}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, value in metric.values.items():
            every = ",".join(filter(None, (f'worker="{worker}"', labels)))
            lines.append(f"{metric.name}{{{every}}} {float(value):.12g}")
    return "\n".join(lines) + "\n"
