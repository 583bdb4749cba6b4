"""Provider keys: what a workspace calls upstreams with. The secret comes in, is sealed, never goes out."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from flask import url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session

from perpetuo import accounts, schemas, web
from perpetuo.config import Settings
from perpetuo.crypto import KeyRing, Unreadable
from perpetuo.errors import NotFound
from perpetuo.fields import is_storable
from perpetuo.gateway import destinations
from perpetuo.gateway.walk import Gateway
from perpetuo.models import ProviderKey, new_id
from perpetuo.providers.catalog import CATALOG
from perpetuo.workspaces import blueprint

LEAST_FOR_HINT = 8  # of a shorter secret four characters would be too much to show
PROBED = ("ok", "http_status", "latency_ms", "models", "error")


@blueprint.get("/<workspace_id>/providers")
def list_provider_keys(workspace_id: str) -> ResponseReturnValue:
    """The provider keys of a workspace, newest first."""
    workspace = web.get_workspace(workspace_id)
    query = sa.select(ProviderKey).where(ProviderKey.workspace_id == workspace.id)
    return web.answer(web.list_page(query, ProviderKey).body(shape))


@blueprint.post("/<workspace_id>/providers")
def create_provider_key(workspace_id: str) -> ResponseReturnValue:
    """A new provider key."""
    web.get_workspace(workspace_id)
    given = web.read(schemas.CreateProviderKey).model_dump(exclude_unset=True)
    secret = given.pop("api_key", None) or ""
    gateway = web.gateway()
    resolved = _resolve(gateway.settings, given["provider"], given.get("base_url"))
    _check_secret(given["provider"], secret)

    def insert(session: Session) -> ProviderKey:
        accounts.lock_workspace(session, workspace_id)
        key = ProviderKey(id=new_id("prov"), workspace_id=workspace_id, resolved_base_url=resolved, **given)
        _seal(gateway.ring, key, secret)
        session.add(key)
        session.flush()
        session.refresh(key)
        return key

    created = gateway.database.save(insert)
    return web.answer(shape(created), 201, to=_url(created))


@blueprint.get("/<workspace_id>/providers/<provider_key_id>")
def show_provider_key(workspace_id: str, provider_key_id: str) -> ResponseReturnValue:
    """One provider key."""
    return web.answer(shape(_get(workspace_id, provider_key_id)))


@blueprint.route("/<workspace_id>/providers/<provider_key_id>", methods=["PATCH", "POST"])
def change_provider_key(workspace_id: str, provider_key_id: str) -> ResponseReturnValue:
    """Changes a provider key; another destination needs the secret again."""
    _get(workspace_id, provider_key_id)
    changes = web.read(schemas.ChangeProviderKey).changes()
    gateway = web.gateway()  # a write on SQLite runs in a thread that has no request

    def change(session: Session) -> ProviderKey:
        key = _lock(session, workspace_id, provider_key_id)
        _apply(gateway, key, dict(changes))
        return key

    key = gateway.database.save(change)
    return web.answer(shape(key), to=_url(key))


@blueprint.delete("/<workspace_id>/providers/<provider_key_id>")
@blueprint.post("/<workspace_id>/providers/<provider_key_id>/delete")
def delete_provider_key(workspace_id: str, provider_key_id: str) -> ResponseReturnValue:
    """Deletes a provider key with its secret."""
    _get(workspace_id, provider_key_id)
    web.gateway().database.save(lambda session: session.delete(_lock(session, workspace_id, provider_key_id)))
    return web.answer(None, 204, to=url_for("workspaces.list_provider_keys", workspace_id=workspace_id))


@blueprint.post("/<workspace_id>/providers/<provider_key_id>/test")
def test_provider_key(workspace_id: str, provider_key_id: str) -> ResponseReturnValue:
    """One cheap call to the upstream: does the key work?"""
    key = _get(workspace_id, provider_key_id)
    try:
        secret = _open(web.gateway().ring, key)
    except Unreadable:
        error = "The stored secret cannot be opened: enter it again."
        return web.answer(
            {"ok": False, "http_status": None, "latency_ms": None, "models": None, "error": error}
        )
    probe = web.gateway().upstream.probe(key.provider, key.resolved_base_url, secret)
    names = ("ok", "http_status", "latency_ms", "models", "error")
    return web.answer({name: getattr(probe, name) for name in names})


def _get(workspace_id: str, provider_key_id: str) -> ProviderKey:
    """The workspace's own provider key. Another's and a missing one give the same NotFound."""
    workspace = web.get_workspace(workspace_id)
    query = sa.select(ProviderKey).where(
        ProviderKey.workspace_id == workspace.id, ProviderKey.id == provider_key_id
    )
    key = None
    if is_storable(provider_key_id):
        key = accounts.reading(web.gateway().database, lambda session: session.scalar(query))
    if key is None:
        raise _missing()
    return key


def _lock(session: Session, workspace_id: str, provider_key_id: str) -> ProviderKey:
    workspace = accounts.lock_workspace(session, workspace_id)
    key = session.get(ProviderKey, provider_key_id, with_for_update={"key_share": True})
    if key is None or key.workspace_id != workspace.id:
        raise _missing()
    return key


def _missing() -> NotFound:
    return NotFound("There is no such provider key.")


def _apply(gateway: Gateway, key: ProviderKey, changes: dict[str, Any]) -> None:
    """Sets what was sent. The secret belongs to its destination: another one never gets it unasked."""
    secret = changes.pop("api_key", None)
    provider, base_url = changes.get("provider", key.provider), changes.get("base_url", key.base_url)
    resolved = _resolve(gateway.settings, provider, base_url)
    if secret is None and (provider, resolved) != (key.provider, key.resolved_base_url):
        secret = _nothing_to_lose(gateway.ring, key)
    for name, value in changes.items():
        setattr(key, name, value)
    key.resolved_base_url = resolved
    if secret is not None:
        _check_secret(provider, secret)
        _seal(gateway.ring, key, secret)
        key.last_error = None


def _nothing_to_lose(ring: KeyRing, key: ProviderKey) -> str:
    """An empty secret may move without being entered again; no other may."""
    try:
        if _open(ring, key) == "":
            return ""
    except Unreadable:
        pass
    raise schemas.invalid("api_key", "Another provider or base_url needs the secret again.")


def _resolve(settings: Settings, provider: str, base_url: str | None) -> str:
    """Where the provider key's calls go. Raises InvalidRequest."""
    entry = CATALOG.get(provider)
    if entry is None:
        raise schemas.invalid("provider", f"Must be one of {', '.join(CATALOG)}.")
    if base_url is None:
        if entry.base_url is None:
            raise schemas.invalid("base_url", f"The provider {provider} needs a base_url.")
        return entry.base_url
    fault = destinations.base_url_fault(base_url, settings)
    if fault:
        raise schemas.invalid("base_url", fault)
    return base_url.rstrip("/")


def _check_secret(provider: str, secret: str) -> None:
    if not secret and not CATALOG[provider].may_lack_api_key:
        raise schemas.invalid("api_key", f"The provider {provider} needs an api_key.")


def _seal(ring: KeyRing, key: ProviderKey, secret: str) -> None:
    key.sealed = ring.seal(secret, *_place(key))
    key.hint = secret[-4:] if len(secret) >= LEAST_FOR_HINT else ""


def _open(ring: KeyRing, key: ProviderKey) -> str:
    return ring.open(key.sealed, *_place(key))


def _place(key: ProviderKey) -> tuple[str, str, str, str]:
    return "provider_key", key.workspace_id, key.id, key.resolved_base_url


def _url(key: ProviderKey) -> str:
    return url_for("workspaces.show_provider_key", workspace_id=key.workspace_id, provider_key_id=key.id)


def shape(key: ProviderKey) -> dict[str, Any]:
    """A provider key as it is answered, without its secret."""
    return {
        "id": key.id,
        "provider": key.provider,
        "name": key.name,
        "base_url": key.base_url,
        "models": key.models,
        "priority": key.priority,
        "weight": key.weight,
        "enabled": key.enabled,
        "prices": key.prices,
        "hint": key.hint,
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "last_error": key.last_error,
    }
