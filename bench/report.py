"""The figures as tables: medians over the rounds, ratios within them, goals beside what was reached.

A row is what one peer did under one load in one round. Its figures stand under their headings, in order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
LABELS = ("peer", "load", "round", "failed")
Row = dict[str, Any]

TITLES = {
    "plain": "Plain calls, by connections (CPU per request: the gateway's processes, PostgreSQL's, both)",
    "streams": "Streams at once, a chunk each 100 ms (a chunk's delay; time to the first; generator's load)",
    "start": "From the command to the first 200 of /healthz, by workers",
    "memory": "Resident MiB of all processes: at first, after n requests, and after half as many more",
}
RATIOS = {
    "plain": [("req/s", "direct"), ("req/s", "nginx"), ("req/s", "base"), ("both ms", "base")],
    "streams": [("p99 ms", "base"), ("µs/chunk", "base")],
    "start": [("start s", "base")],
    "memory": [("after n", "base")],
}
STEADIEST = ("both ms", "µs/chunk", "start s", "req/s", "p50 ms")  # the first that a row has tells its spread
# The project's targets: part, load, figure, the most it may be now, and then.
GOALS = [
    ("CPU per request, c=64, PostgreSQL included, ms", "plain", 64, "both ms", 0.75, 0.45),
    ("added latency, c=1, p50, ms", "plain", 1, "added ms", 1.5, 0.8),
    ("streams, 1,000 at once, p99 delay, ms", "streams", 1000, "p99 ms", 20, 8),
    ("CPU per streamed chunk, 1,000 at once, µs", "streams", 1000, "µs/chunk", 90, 50),
    ("start to the first 200, 2 workers, s", "start", 2, "start s", 1.5, 0.7),
    ("resident after 100,000 requests, MiB", "memory", 100_000, "after n", 200, 150),
]


def table(part: str, rows: list[Row]) -> Iterator[str]:
    """The lines of one part's table; a ratio is the median of the ratios within each round."""
    figures = list(dict.fromkeys(key for row in rows for key in row if key not in LABELS))
    families = {row["peer"].partition(" ")[0] for row in rows}
    ratios = [(key, to) for key, to in RATIOS[part] if to in families and key in figures]
    ratio_names = [f"{key.split('/')[0].split()[0]}/{to}" for key, to in ratios]
    lines = [["", "", *figures, *ratio_names, "spread", "failed"]]
    for load, peer in dict.fromkeys((row["load"], row["peer"]) for row in rows):
        mine = select(rows, load, peer)
        cells = [text(values(mine, key)) for key in figures]
        cells += [text(paired(rows, mine, key, to)) for key, to in ratios]
        lines.append([f"{load:,}", peer, *cells, spread(mine), str(sum(row["failed"] for row in mine))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    yield f"\n{TITLES[part]}"
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def select(rows: list[Row], load: int, peer: str) -> list[Row]:
    return [row for row in rows if row["load"] == load and row["peer"] == peer]


def values(rows: list[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def text(found: list[float]) -> str:
    """Their median with about three digits."""
    if not found:
        return "-"
    middle = median(found)
    places = next((places for places, least in enumerate((100, 10, 1)) if abs(middle) >= least), 3)
    return f"{middle:,.{0 if isinstance(middle, int) else places}f}"


def paired(rows: list[Row], mine: list[Row], key: str, to: str) -> list[float]:
    """Round by round this peer's figure over the reference's; of BASE the one on the same database."""
    family, _, backend = mine[0]["peer"].partition(" ")
    if family in (to, "direct") or (to == "base" and family != "gateway"):
        return []
    reference = select(rows, mine[0]["load"], f"{to} {backend}" if to == "base" else to)
    theirs = {row["round"]: row.get(key) for row in reference}
    return [row[key] / theirs[row["round"]] for row in mine if key in row and theirs.get(row["round"])]


def spread(rows: list[Row]) -> str:
    """(greatest - least) / median: what two rounds of the same differ by, which is noise."""
    found = next((found for key in STEADIEST if (found := values(rows, key))), [])
    return f"{(max(found) - min(found)) / median(found):.0%}" if len(found) > 1 and median(found) else "-"


def add_latency(rows: list[Row]) -> None:
    """What each call's median has above the direct one's of the same round."""
    direct = {(row["load"], row["round"]): row["p50 ms"] for row in rows if row["peer"] == "direct"}
    for row in rows:
        if row["peer"] != "direct" and (row["load"], row["round"]) in direct:
            row["added ms"] = row["p50 ms"] - direct[row["load"], row["round"]]


def goals(measured: dict[str, list[Row]]) -> Iterator[str]:
    """What was reached of the targets, as far as this run measured it."""
    yield f"\n{'Targets':<69}{'got':>9}{'reach':>9}{'then':>9}"
    for words, part, load, key, reach, then in GOALS:
        for peer in dict.fromkeys(row["peer"] for row in measured.get(part, [])):
            found = values(select(measured[part], load, peer), key)
            if found and peer.startswith("gateway"):
                got = median(found)
                verdict = "then" if got <= then else "reach" if got <= reach else "missed"
                yield f"{words:<49} {peer:<19}{text(found):>9}{reach:>9}{then:>9}  {verdict}"


def save(facts: dict[str, str], notes: list[str], measured: dict[str, list[Row]]) -> Path:
    """Everything, round by round, as JSON."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    content = {"facts": facts, "notes": notes, "rows": measured}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
