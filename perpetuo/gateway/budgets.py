"""The accounts of API keys and workspaces inside a transaction of the ledger: locked, read, written back.

A budget's spent is the sum of the counters of its period, carried on in a column. For some seconds after a
budget begins, calls of processes that do not know of it yet may settle without moving that column, so it is
summed anew at each look until then (`recount_until`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.gateway.limits import RECOUNT_SECONDS, Account, Kind
from perpetuo.models import ApiKey, RequestLog, UsageCounter, Workspace
from perpetuo.periods import period_start

LOGS = RequestLog.__table__.c
COUNTERS = UsageCounter.__table__.c

COLUMNS = {
    "api_key": "id, workspace_id, name, budget_nano, budget_period, spent_nano, held_nano, period_start, "
    "recount_until, rpm_limit, tpm_limit, rpm_full_at, tpm_full_at",
    "workspace": "id, id, name, monthly_budget_nano, 'month', spent_nano, held_nano, period_start, "
    "recount_until",
}
TABLES: dict[Kind, str] = {"api_key": "api_keys", "workspace": "workspaces"}
SET: dict[Kind, str] = {
    "api_key": "update api_keys set spent_nano = %s, held_nano = %s, period_start = %s, recount_until = %s, "
    "rpm_full_at = %s, tpm_full_at = %s where id = %s",
    "workspace": "update workspaces set spent_nano = %s, held_nano = %s, period_start = %s, "
    "recount_until = %s where id = %s",
}


class Accounts:
    """The accounts that one transaction concerns: API keys by id first, then workspaces by id, all locked.

    `now` is the database's clock, read after the locks.
    """

    def __init__(
        self,
        database: Database,
        connection: Connection,
        keys: Iterable[str],
        workspaces: Iterable[str],
        url: str,
    ) -> None:
        self._database = database
        self._connection = connection
        self._url = url
        self.keys = self._lock("api_key", keys)
        self.workspaces = self._lock("workspace", workspaces)
        self.now = database.now(connection)
        self._before = {id(account): account.state() for account in self._all()}
        for account in self._all():
            if account.recount_until is not None and account.budget_nano is not None:
                self._recount(account)

    def _all(self) -> list[Account]:
        return [*self.keys.values(), *self.workspaces.values()]

    def _lock(self, kind: Kind, ids: Iterable[str]) -> dict[str, Account]:
        wanted = sorted(set(ids))
        if not wanted:
            return {}
        statement = (
            f"select {COLUMNS[kind]} from {TABLES[kind]} "  # noqa: S608
            f"where id in ({', '.join(['%s'] * len(wanted))}) order by id{self._database.for_update}"
        )
        rows = self._connection.exec_driver_sql(self._database.sql(statement), tuple(wanted))
        return {row[0]: self._account(kind, row) for row in rows}

    def _account(self, kind: Kind, row: Any) -> Account:
        id, workspace_id, name, budget, period, spent, held, start, recount, *limits = row
        moment = self._database.moment
        page = f"{self._url}/workspaces/{workspace_id}"
        page += f"/api-keys/{id}" if kind == "api_key" else "/settings"
        account = Account(kind, id, name, page, budget, period, spent, held, moment(start), moment(recount))
        if limits:
            account.rpm_limit, account.tpm_limit = limits[:2]
            account.rpm_full_at, account.tpm_full_at = map(moment, limits[2:])
        return account

    def _recount(self, account: Account) -> None:
        account.turn(self.now)
        account.spent_nano = spent_between(self._connection, account.kind, account.id, account.period_start)
        if account.recount_until is not None and self.now >= account.recount_until:
            account.recount_until = None

    def write(self) -> None:
        """Writes back what has changed."""
        for account in self._all():
            if account.state() != self._before[id(account)]:
                self._write(account)

    def _write(self, account: Account) -> None:
        times = [account.period_start, account.recount_until]
        if account.kind == "api_key":
            times += [account.rpm_full_at, account.tpm_full_at]
        stored = [self._database.time(time) if time is not None else None for time in times]
        values = (account.spent_nano, account.held_nano, *stored, account.id)
        self._connection.exec_driver_sql(self._database.sql(SET[account.kind]), values)


def spent_between(
    connection: Connection, kind: Kind, id: str, start: datetime | None, end: datetime | None = None
) -> int:
    """What the counters say that an API key or a workspace spent in that time, in nano-dollars."""
    mine = COUNTERS.api_key_id if kind == "api_key" else COUNTERS.workspace_id
    statement = sa.select(sa.func.coalesce(sa.func.sum(COUNTERS.cost_nano), 0)).where(mine == id)
    if kind == "api_key":  # its counters are found by their workspace
        workspace = sa.select(ApiKey.workspace_id).where(ApiKey.id == id).scalar_subquery()
        statement = statement.where(COUNTERS.workspace_id == workspace)
    if start is not None:
        statement = statement.where(COUNTERS.hour >= start)
    if end is not None:
        statement = statement.where(COUNTERS.hour < end)
    return int(connection.execute(statement).scalar_one())


def held_since(connection: Connection, kind: Kind, id: str, since: datetime) -> int:
    """What the open rows of that time hold of its budget, in nano-dollars."""
    mine, period = (
        (LOGS.api_key_id, LOGS.key_period)
        if kind == "api_key"
        else (LOGS.workspace_id, LOGS.workspace_period)
    )
    statement = sa.select(sa.func.coalesce(sa.func.sum(LOGS.hold_nano), 0)).where(
        mine == id,
        period.is_not(None),
        LOGS.status == sa.literal_column("'open'"),
        LOGS.created_at >= since,
    )
    return int(connection.execute(statement).scalar_one())


def begin(database: Database, connection: Connection, owner: ApiKey | Workspace) -> None:
    """A first budget or another period of a locked owner: its spent and held are taken from the books."""
    kind: Kind = "api_key" if isinstance(owner, ApiKey) else "workspace"
    period = owner.budget_period if isinstance(owner, ApiKey) else "month"
    now = database.now(connection)
    start = period_start(period, now)
    owner.period_start = start
    owner.spent_nano = spent_between(connection, kind, owner.id, start)
    owner.held_nano = held_since(connection, kind, owner.id, start)
    owner.recount_until = now + timedelta(seconds=RECOUNT_SECONDS)


def recount(connection: Connection, now: datetime, keys: Iterable[str], workspaces: Iterable[str]) -> None:
    """Has the spent of these budgets summed anew: the cost of calls was put right. First of a transaction."""
    until = now + timedelta(seconds=RECOUNT_SECONDS)
    for id in sorted(set(keys)):
        connection.execute(sa.update(ApiKey).where(ApiKey.id == id).values(recount_until=until))
    for id in sorted(set(workspaces)):
        connection.execute(sa.update(Workspace).where(Workspace.id == id).values(recount_until=until))
