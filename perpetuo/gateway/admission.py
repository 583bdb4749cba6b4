"""How a call gets its open row: at once, or once its budgets and limits let it pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from perpetuo.gateway import bounds
from perpetuo.gateway.access import Caller
from perpetuo.gateway.bounds import Demand
from perpetuo.gateway.calls import Call
from perpetuo.gateway.intake import Asked
from perpetuo.gateway.ledger import Ledger
from perpetuo.gateway.limits import Ask
from perpetuo.gateway.router import Target
from perpetuo.gateway.rows import Row, Values


def open_row(
    ledger: Ledger,
    call: Call,
    caller: Caller,
    asked: Asked,
    targets: Sequence[Target],
    values: Values,
    patience: float,
) -> tuple[Row, Sequence[Target]]:
    """The row of a call that begins, and the targets with what the limits let each of them write.

    Raises what they refuse, Unavailable, and Aborted while the call waits for money that others hold.
    """
    if not caller.is_limited:
        return ledger.open(caller, values), targets
    created_at: datetime = values["created_at"]
    demand = bounds.demand_of(asked, targets, created_at, needs_price=caller.has_budget)
    call.allow(float("inf"), "total")
    ask = Ask(demand.nano(), demand.least_nano(), demand.tokens())
    row = ledger.admit(caller, values, ask, patience, call.wait)
    hold = row.decided.hold_nano
    kept = [targets[place] for place in demand.kept]
    return row, kept if hold is None else _limited(kept, demand, hold)


def _limited(targets: Sequence[Target], demand: Demand, hold_nano: int) -> list[Target]:
    found = []
    for target, bound, limit in zip(targets, demand.bounds, demand.limits(hold_nano), strict=True):
        is_shrunk = limit is not None and limit < bound.output_tokens
        found.append(replace(target, output_limit=limit, is_shrunk=is_shrunk))
    return found
