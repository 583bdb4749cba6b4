"""Measures this gateway against its upstream, nginx and another commit; README.md beside says how."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator

from bench import machine, parts, report
from bench.ground import Ground, prepared
from bench.report import Row
from bench.streams import LEAST_CHUNKS

PARTS: dict[str, Callable[[Ground, parts.Plan], Iterator[Row]]] = {
    "plain": parts.plain,
    "streams": parts.streams,
    "start": parts.start,
    "memory": parts.memory,
}
FULL = {"rounds": 3, "seconds": 3, "chunks": 40, "starts": 5, "requests": 100_000}
QUIET_CORES = 0.15  # more other work than this shows in the latencies
QUICK = {"rounds": 1, "seconds": 2, "chunks": 30, "starts": 3, "requests": 5_000}


def main(arguments: list[str] | None = None) -> None:
    """Prints what it could measure. No figure is an error, and neither is a part that breaks."""
    options = parse(arguments)
    others = machine.others()
    facts = machine.facts(options.backends, options.base)
    measured: dict[str, list[Row]] = {}
    with prepared(options.backends, options.base, with_limits=options.limits) as ground:
        for name in options.only:
            try:
                for row in PARTS[name](ground, plan(options)):
                    measured.setdefault(name, []).append(row)
                    tell(name, row)
            except Exception as exc:
                traceback.print_exc()
                ground.note(f"{name} was not measured to its end: {str(exc).partition(chr(10))[0]}")
    cores = others()
    facts["other work"] = f"{cores:.2f} cores on average during this run"
    if cores > QUIET_CORES:
        ground.note("the machine was busy with other work: no figure here stands for itself")
    show(facts, ground.notes, measured)


def tell(part: str, row: Row) -> None:
    """Progress, on the error stream so that the tables can be piped."""
    figures = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print(f"{part}: {figures}", file=sys.stderr)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute, and rough")
    parser.add_argument("--only", type=among(*PARTS), default=list(PARTS), help=",".join(PARTS))
    backends = among("sqlite", "postgresql")
    parser.add_argument("--backends", type=backends, default=["sqlite", "postgresql"])
    parser.add_argument("--base", help="another commit of ours, measured in the same rounds")
    parser.add_argument("--limits", action="store_true", help="also with a key that has a budget and limits")
    parser.add_argument("--connections", type=numbers, default=[1, 16, 64])
    parser.add_argument("--streams", type=numbers, help="how many at once: 100,300,1000; quick 1000")
    parser.add_argument("--rounds", type=int, help="of plain calls and streams")
    parser.add_argument("--seconds", type=int, help="of each burst of plain calls, whole")
    parser.add_argument("--chunks", type=int, help="of each stream")
    parser.add_argument("--starts", type=int)
    parser.add_argument("--requests", type=int, help="before memory is looked at")
    options = parser.parse_args(arguments)
    if options.chunks is not None and options.chunks < LEAST_CHUNKS:
        parser.error(f"--chunks must be at least {LEAST_CHUNKS}, or the streams never all run at once")
    return options


def among(*choices: str) -> Callable[[str], list[str]]:
    """Reads words with commas between them, each of these choices."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(choices):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(choices)}")
        return words

    return read


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def plan(options: argparse.Namespace) -> parts.Plan:
    amounts = QUICK if options.quick else FULL
    given = {name: value for name in amounts if (value := getattr(options, name)) is not None}
    streams = options.streams or ([1000] if options.quick else [100, 300, 1000])
    return parts.Plan(connections=options.connections, streams=streams, **{**amounts, **given})


def show(facts: dict[str, str], notes: list[str], measured: dict[str, list[Row]]) -> None:
    report.add_latency(measured.get("plain", []))
    for name, rows in measured.items():
        print("\n".join(report.table(name, rows)))
    print("\n".join(report.goals(measured)))
    print("\n" + "\n".join(f"{name:<16} {value}" for name, value in facts.items()))
    print("".join(f"\nNOTE: {note}" for note in notes))
    print(f"{report.save(facts, notes, measured)}", file=sys.stderr)


if __name__ == "__main__":
    main()
