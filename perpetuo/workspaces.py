"""Blueprint `workspaces`: the workspaces; provider keys and API keys join it from their own modules."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from flask import Blueprint, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session

from perpetuo import accounts, reports, schemas, web
from perpetuo.gateway import budgets
from perpetuo.models import ApiKey, RequestLog, UsageCounter, Workspace
from perpetuo.periods import period_end
from perpetuo.reports import Spending
from perpetuo.wire import usd

blueprint = web.protect(Blueprint("workspaces", __name__, url_prefix="/workspaces"))

BATCH = 5_000  # log rows deleted in one transaction, so that no other write waits for long


@blueprint.get("")
def list_workspaces() -> ResponseReturnValue:
    """The user's own workspaces, newest first."""
    page = web.list_page(sa.select(Workspace).where(Workspace.user_id == web.user().id), Workspace)
    spent = _spent([workspace.id for workspace in page.rows])
    return web.answer(page.body(lambda workspace: shape(workspace, spent)))


@blueprint.post("")
def create_workspace() -> ResponseReturnValue:
    """A new workspace."""
    form = web.read(schemas.CreateWorkspace)
    user_id = web.user().id

    def insert(session: Session) -> Workspace:
        workspace = Workspace(user_id=user_id, name=form.name)
        session.add(workspace)
        session.flush()
        session.refresh(workspace)
        return workspace

    workspace = web.gateway().database.save(insert)
    return web.answer(shape(workspace, {}), 201, to=_url(workspace.id))


@blueprint.get("/<workspace_id>")
def show_workspace(workspace_id: str) -> ResponseReturnValue:
    """One workspace."""
    workspace = web.get_workspace(workspace_id)
    return web.answer(shape(workspace, _spent([workspace.id])))


@blueprint.route("/<workspace_id>", methods=["PATCH", "POST"])
def change_workspace(workspace_id: str) -> ResponseReturnValue:
    """Changes the settings of a workspace."""
    web.get_workspace(workspace_id)
    changes = web.read(schemas.ChangeWorkspace).changes()
    if "monthly_budget_usd" in changes:
        changes["monthly_budget_nano"] = changes.pop("monthly_budget_usd")
    database = web.gateway().database  # a write on SQLite runs in a thread that has no request

    def change(session: Session) -> Workspace:
        workspace = accounts.lock_workspace(session, workspace_id)
        had_budget = workspace.monthly_budget_nano is not None
        for name, value in changes.items():
            setattr(workspace, name, value)
        if workspace.monthly_budget_nano is not None and not had_budget:
            budgets.begin(database, session.connection(), workspace)
        return workspace

    workspace = database.save(change)
    return web.answer(shape(workspace, _spent([workspace.id])), to=_url(workspace_id))


@blueprint.delete("/<workspace_id>")
@blueprint.post("/<workspace_id>/delete")
def delete_workspace(workspace_id: str) -> ResponseReturnValue:
    """Deletes a workspace with its keys, logs and counters."""
    web.get_workspace(workspace_id)
    database = web.gateway().database
    # The many rows first, batch by batch: whoever is interrupted here can ask again.
    while database.transaction(lambda connection: _delete_batch(connection, workspace_id)) == BATCH:
        pass
    database.save(lambda session: _delete_rest(session, workspace_id))
    return web.answer(None, 204, to=url_for("workspaces.list_workspaces"))


def _delete_batch(connection: sa.Connection, workspace_id: str) -> int:
    some = sa.select(RequestLog.id).where(RequestLog.workspace_id == workspace_id).limit(BATCH)
    return connection.execute(sa.delete(RequestLog).where(RequestLog.id.in_(some))).rowcount


def _delete_rest(session: Session, workspace_id: str) -> None:
    """API keys, workspace, logs, counters: the order in which the ledger locks them."""
    keys = sa.select(ApiKey.id).where(ApiKey.workspace_id == workspace_id).order_by(ApiKey.id)
    session.execute(keys.with_for_update())
    session.delete(accounts.lock_workspace(session, workspace_id))
    session.flush()
    session.execute(sa.delete(RequestLog).where(RequestLog.workspace_id == workspace_id))
    session.execute(sa.delete(UsageCounter).where(UsageCounter.__table__.c.workspace_id == workspace_id))


def _spent(ids: list[str]) -> dict[str, Spending]:
    return web.gateway().database.read_many(lambda connection: reports.spent_by_workspace(connection, ids))


def _url(workspace_id: str) -> str:
    return url_for("workspaces.show_workspace", workspace_id=workspace_id)


def shape(workspace: Workspace, spent: dict[str, Spending]) -> dict[str, Any]:
    """A workspace as it is answered."""
    return {
        "id": workspace.id,
        "name": workspace.name,
        "created_at": workspace.created_at,
        "log_bodies": workspace.log_bodies,
        "retention_days": workspace.retention_days,
        "pruned_before": workspace.pruned_before,
        "monthly_budget_usd": usd(workspace.monthly_budget_nano),
        "spent_usd": usd(spent.get(workspace.id, Spending()).nano),
        "held_usd": usd(reports.held_now(workspace, "month")),
        "resets_at": period_end("month", datetime.now(UTC)),
        "routes": workspace.routes,
    }
