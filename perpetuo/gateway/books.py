"""One batch of the ledger inside its transaction: accounts, rows and counters, in the order of their locks.

Always API keys by id, workspaces by id, request logs by id, counters by key: so two processes never wait for
each other in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.gateway import admissions, statements
from perpetuo.gateway.budgets import Accounts
from perpetuo.gateway.rows import Snapshot
from perpetuo.gateway.statements import CounterKey, Values

LimitsOf = Callable[[str], tuple[bool, bool]]


def anyone(_: str) -> tuple[bool, bool]:
    """Where nothing is known of an API key, it and its workspace may have a budget."""
    return True, True


class Books:
    """`limits_of(api_key_id)`: whether that key, and whether its workspace, may have a budget or limits."""

    def __init__(self, database: Database, limits_of: LimitsOf = anyone, public_url: str = "") -> None:
        self.database = database
        self._limits_of = limits_of
        self._public_url = public_url

    def write(self, connection: Connection, snapshots: Sequence[Snapshot]) -> int:
        """Writes a batch inside a transaction, its rows and what they change in the counters; how many rows.

        Exactly once: the counters move by what the transaction really wrote. A row that may be there already
        is read first, under its lock: an open one is settled, a swept one put right by the difference, and
        what is done is dropped. May run twice for one batch, so it leaves the rows in memory alone.
        """
        accounts = self._accounts(connection, snapshots)
        found = self._found(connection, [s.row.id for s in snapshots if s.may_exist])
        writes = [s for s in snapshots if _is_due(s, found.get(s.row.id))]
        if accounts is not None:
            admissions.settle(self.database, accounts, writes, found)
            admissions.decide(self.database, accounts, snapshots, found)
            writes = [s for s in writes if s.verdict is None or s.verdict.is_admitted]
            accounts.write()
        if not writes:
            return 0
        parameters = [statements.row_parameters(self.database, snapshot.values) for snapshot in writes]
        written = self._execute(connection, statements.upsert_rows(len(writes)), parameters)
        ids = {row_id for (row_id,) in written.all()}
        totals: dict[CounterKey, Values] = {}
        for snapshot in writes:
            if snapshot.is_final and snapshot.row.id in ids:
                _move(totals, snapshot, found.get(snapshot.row.id))
        self.move_counters(connection, totals)
        return len(ids)

    def _accounts(self, connection: Connection, snapshots: Sequence[Snapshot]) -> Accounts | None:
        """What this batch has to lock before its rows; None where nobody has a budget or limits."""
        keys: set[str] = set()
        workspaces: set[str] = set()
        for snapshot in snapshots:
            of_key, of_workspace = admissions.concerned(snapshot, self._limits_of)
            if of_key:
                keys.add(snapshot.values["api_key_id"])
            if of_workspace:
                workspaces.add(snapshot.values["workspace_id"])
        if not keys and not workspaces:
            return None
        return Accounts(self.database, connection, keys, workspaces, self._public_url)

    def _found(self, connection: Connection, ids: list[str]) -> dict[str, Values]:
        if not ids:
            return {}
        statement = statements.select_rows(len(ids), self.database.for_update)
        rows = self._execute(connection, statement, [ids]).mappings()
        return {row["id"]: dict(row) for row in rows}

    def move_counters(self, connection: Connection, totals: dict[CounterKey, Values]) -> None:
        """Adds to the counters, in their order, what the rows written in this transaction came to."""
        if not totals:
            return
        ordered = sorted(totals.items())  # two processes then never wait for each other
        parameters = [statements.counter_parameters(self.database, *total) for total in ordered]
        self._execute(connection, statements.upsert_counters(len(parameters)), parameters)

    def _execute(self, connection, statement, parameters):  # type: ignore[no-untyped-def]
        return connection.exec_driver_sql(self.database.sql(statement), statements.flat(parameters))


def _is_due(snapshot: Snapshot, found: Values | None) -> bool:
    """Whether this row still has to be written, given what is in the database (None: it is not there)."""
    if found is None:
        # A row known to be committed that is gone went with its workspace.
        return not snapshot.row.is_open
    if snapshot.is_sweep:
        return found["status"] == "open" and found["orphaned_at"] is not None
    return snapshot.is_final and (found["status"] == "open" or bool(found["swept"]))


def _move(totals: dict[CounterKey, Values], snapshot: Snapshot, found: Values | None) -> None:
    values = snapshot.values
    place = (values["created_at"], values["workspace_id"], values["api_key_id"])
    statements.add(totals, *statements.contribution(*place, values))
    if found is not None and found["status"] != "open":
        statements.add(totals, *statements.contribution(*place, found), sign=-1)
