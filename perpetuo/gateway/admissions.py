"""How the rows of one batch and the accounts of their keys move each other, in the ledger's transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import orjson

from perpetuo.db import Database
from perpetuo.gateway import limits
from perpetuo.gateway.budgets import Accounts
from perpetuo.gateway.limits import PERIODS, Kind, Settled, Verdict
from perpetuo.gateway.rows import Snapshot, Values

Found = Mapping[str, Values]  # rows of the batch as they are in the database, by id


def concerned(snapshot: Snapshot, limits_of: Callable[[str], tuple[bool, bool]]) -> tuple[bool, bool]:
    """Whether this row may move the account of its API key, and that of its workspace.

    What never cost nor held anything moves none; a call without limits settles without a lock.
    """
    values = snapshot.values
    of_key, of_workspace = limits_of(values["api_key_id"])
    if snapshot.ask is not None:
        return True, of_workspace
    if not snapshot.is_final or not (values.get("cost_nano") or snapshot.may_exist):
        return False, False
    asked = snapshot.row.ask is not None or values.get("token_advance_us") is not None
    return (
        of_key or asked or values.get("key_period") is not None,
        of_workspace or asked or values.get("workspace_period") is not None,
    )


def settle(database: Database, accounts: Accounts, writes: Sequence[Snapshot], found: Found) -> None:
    """Gives back what the rows that end held, and takes what they cost."""
    for snapshot in writes:
        if not snapshot.is_final:
            continue
        before = found.get(snapshot.row.id)
        if before is not None:  # its own time is that of its admission
            snapshot.values["created_at"] = database.moment(before["created_at"])
        row = _settled(snapshot.values, before)
        key = accounts.keys.get(snapshot.values["api_key_id"])
        workspace = accounts.workspaces.get(snapshot.values["workspace_id"])
        for account in (key, workspace):
            if account is not None:
                limits.settle(account, row, accounts.now)


def _settled(values: Values, before: Values | None) -> Settled:
    cost = values.get("cost_nano") or 0
    was_open = before is not None and before["status"] == "open"
    paid = 0 if before is None or was_open else before["cost_nano"] or 0
    holds: tuple[Kind, ...] = ()
    if before is not None and was_open:
        holds = tuple(kind for kind, name in PERIODS.items() if before[name] is not None)
    return Settled(
        created_at=values["created_at"],
        was_open=was_open,
        hold_nano=(before["hold_nano"] or 0) if before is not None else 0,
        holds=holds,
        cost_nano=cost - paid,
        # What the dead used nobody knows: their tokens stay taken.
        tokens=None if values.get("swept") else values.get("total_tokens") or 0,
        token_advance_us=before["token_advance_us"] if before is not None else None,
    )


def decide(database: Database, accounts: Accounts, snapshots: Sequence[Snapshot], found: Found) -> None:
    """Decides every admission, in the order of arrival."""
    for snapshot in snapshots:
        if snapshot.ask is None:
            continue
        before = found.get(snapshot.row.id)
        if before is not None:  # an earlier commit that seemed to fail has admitted it
            snapshot.verdict = _verdict(database, before)
            continue
        key = accounts.keys.get(snapshot.values["api_key_id"])
        workspace = accounts.workspaces.get(snapshot.values["workspace_id"])
        if key is None:  # it went with its workspace while the call was on its way
            snapshot.verdict = Verdict()
        else:
            snapshot.verdict = limits.decide(key, workspace, snapshot.ask, accounts.now)
        snapshot.values = {**snapshot.values, **snapshot.verdict.values}


def _verdict(database: Database, row: Values) -> Verdict:
    times = ("created_at", "key_period", "workspace_period")
    values = {name: database.moment(row[name]) for name in times}
    values |= {name: row[name] for name in ("hold_nano", "token_advance_us")}
    return Verdict(values | {"checks": orjson.loads(row["checks"] or "[]")})
