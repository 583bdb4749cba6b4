"""API keys: what callers are let in with. The key is shown once, in the answer that makes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from flask import url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session

from perpetuo import accounts, crypto, reports, schemas, web
from perpetuo.errors import NotFound
from perpetuo.fields import is_storable
from perpetuo.gateway import budgets
from perpetuo.models import ApiKey
from perpetuo.periods import period_end
from perpetuo.reports import Spending
from perpetuo.wire import usd
from perpetuo.workspaces import blueprint


@blueprint.get("/<workspace_id>/api-keys")
def list_api_keys(workspace_id: str) -> ResponseReturnValue:
    """The API keys of a workspace, newest first, the revoked ones too."""
    workspace = web.get_workspace(workspace_id)
    page = web.list_page(sa.select(ApiKey).where(ApiKey.workspace_id == workspace.id), ApiKey)
    spent = _spent(workspace.id, {key.budget_period for key in page.rows})
    return web.answer(page.body(lambda key: shape(key, spent)))


@blueprint.post("/<workspace_id>/api-keys")
def create_api_key(workspace_id: str) -> ResponseReturnValue:
    """A new API key; the only answer that has the key itself."""
    web.get_workspace(workspace_id)
    given = _columns(web.read(schemas.CreateApiKey).changes())
    secret = crypto.new_api_key()

    def insert(session: Session) -> ApiKey:
        accounts.lock_workspace(session, workspace_id)
        key = ApiKey(
            workspace_id=workspace_id,
            prefix=secret[: crypto.PREFIX_LENGTH],
            hash=crypto.hash_api_key(secret),
            **given,
        )
        session.add(key)
        session.flush()
        session.refresh(key)
        return key

    key = web.gateway().database.save(insert)
    return web.answer({**shape(key, {}), "key": secret}, 201)


@blueprint.get("/<workspace_id>/api-keys/<api_key_id>")
def show_api_key(workspace_id: str, api_key_id: str) -> ResponseReturnValue:
    """One API key."""
    return _answer(_get(workspace_id, api_key_id))


@blueprint.route("/<workspace_id>/api-keys/<api_key_id>", methods=["PATCH", "POST"])
def change_api_key(workspace_id: str, api_key_id: str) -> ResponseReturnValue:
    """Changes an API key's name, limits or budget."""
    _get(workspace_id, api_key_id)
    changes = _columns(web.read(schemas.ChangeApiKey).changes())
    database = web.gateway().database  # a write on SQLite runs in a thread that has no request

    def change(session: Session) -> ApiKey:
        key = _lock(session, workspace_id, api_key_id)
        before = key.budget_nano is not None, key.budget_period
        for name, value in changes.items():
            setattr(key, name, value)
        if key.budget_nano is not None and before != (True, key.budget_period):
            budgets.begin(database, session.connection(), key)
        return key

    return _answer(database.save(change))


@blueprint.delete("/<workspace_id>/api-keys/<api_key_id>")
@blueprint.post("/<workspace_id>/api-keys/<api_key_id>/delete")
def revoke_api_key(workspace_id: str, api_key_id: str) -> ResponseReturnValue:
    """Revokes an API key, for good; it stays in the list."""
    _get(workspace_id, api_key_id)

    def revoke(session: Session) -> None:
        key = _lock(session, workspace_id, api_key_id)
        key.revoked_at = key.revoked_at or datetime.now(UTC)

    web.gateway().database.save(revoke)
    return web.answer(None, 204, to=url_for("workspaces.list_api_keys", workspace_id=workspace_id))


def _columns(changes: dict[str, Any]) -> dict[str, Any]:
    if "budget_usd" in changes:
        changes["budget_nano"] = changes.pop("budget_usd")
    return changes


def _get(workspace_id: str, api_key_id: str) -> ApiKey:
    """The workspace's own API key. Another's and a missing one give the same NotFound."""
    workspace = web.get_workspace(workspace_id)
    query = sa.select(ApiKey).where(ApiKey.workspace_id == workspace.id, ApiKey.id == api_key_id)
    key = None
    if is_storable(api_key_id):
        key = accounts.reading(web.gateway().database, lambda session: session.scalar(query))
    if key is None:
        raise _missing()
    return key


def _lock(session: Session, workspace_id: str, api_key_id: str) -> ApiKey:
    """The key, then its workspace: the order in which everyone locks them."""
    key = session.get(ApiKey, api_key_id, with_for_update={"key_share": True})
    if key is None or key.workspace_id != workspace_id:
        raise _missing()
    accounts.lock_workspace(session, workspace_id)
    return key


def _missing() -> NotFound:
    return NotFound("There is no such API key.")


def _spent(workspace_id: str, periods: set[str]) -> dict[tuple[str, str], Spending]:
    """By (period, API key) what was spent in the present period."""
    return web.gateway().database.read_many(
        lambda connection: reports.spent_by_api_key(connection, workspace_id, periods)
    )


def _answer(key: ApiKey) -> ResponseReturnValue:
    url = url_for("workspaces.show_api_key", workspace_id=key.workspace_id, api_key_id=key.id)
    return web.answer(shape(key, _spent(key.workspace_id, {key.budget_period})), to=url)


def shape(key: ApiKey, spent: dict[tuple[str, str], Spending]) -> dict[str, Any]:
    """An API key as it is answered, without the key itself."""
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
        "models": key.models,
        "rpm_limit": key.rpm_limit,
        "tpm_limit": key.tpm_limit,
        "budget_usd": usd(key.budget_nano),
        "budget_period": key.budget_period,
        "spent_usd": usd(spent.get((key.budget_period, key.id), Spending()).nano),
        "held_usd": usd(reports.held_now(key, key.budget_period)),
        "resets_at": period_end(key.budget_period, datetime.now(UTC)),
    }
