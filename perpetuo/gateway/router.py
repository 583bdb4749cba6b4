"""From the model asked for to the ordered targets that can serve it.

A workspace's provider keys and routes are read once for each `config_version`, which every management
write moves; the secrets stay sealed until a call needs one.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from perpetuo.db import Database
from perpetuo.errors import Forbidden, NotFound
from perpetuo.gateway.access import Caller
from perpetuo.models import ProviderKey, Workspace
from perpetuo.price_list import Overrides
from perpetuo.providers import catalog

KEPT = 1000  # workspaces


@dataclass(frozen=True, slots=True)
class Key:
    """An enabled provider key, its secret sealed."""

    id: str
    workspace_id: str
    provider: str
    name: str | None
    base_url: str
    sealed: str
    models: tuple[str, ...] | None
    priority: int
    weight: int
    created_at: datetime
    prices: Overrides = Overrides(None)

    def serves(self, model: str) -> bool:
        """Whether `models` lets this name through; without `models` everything may pass."""
        return self.models is None or _matches(model, self.models)


@dataclass(frozen=True, slots=True)
class Target:
    """One way to serve a request: this key, this name sent upstream."""

    key: Key
    model: str
    output_limit: int | None = None  # sent as the maximum of output tokens in place of the client's
    is_shrunk: bool = False  # because a budget has no more


@dataclass(frozen=True, slots=True)
class Config:
    """What one workspace routes with."""

    keys: tuple[Key, ...]
    routes: dict[str, list[dict[str, Any]]]
    found: dict[str, tuple[str, list[Key]]] = field(default_factory=dict)  # by name asked, before any draw


class Router:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[str, tuple[int, Config]] = OrderedDict()
        self._lock = threading.Lock()

    def route(self, caller: Caller, names: Sequence[str]) -> list[Target]:
        """The targets for the names asked, in the order in which to try them.

        Raises Forbidden (`model_not_allowed`), NotFound (`model_not_found`), Unavailable.
        """
        for name in names:
            if not is_allowed(caller, name):
                raise Forbidden(
                    f"This API key may not use the model '{name}'. Its `models` say what it may use.",
                    code="model_not_allowed",
                    param="model",
                )
        config = self.config(caller)
        targets = [target for name in names for target in _targets(config, name)]
        if not targets:
            raise NotFound(_explain(config, names), code="model_not_found", param="model")
        return targets

    def config(self, caller: Caller) -> Config:
        """The caller's workspace as of its `config_version`. Raises Unavailable."""
        version, config = self._known.get(caller.workspace_id, (-1, None))
        if config is None or version != caller.config_version:
            version, config = self._database.read(lambda connection: _select(connection, caller.workspace_id))
            with self._lock:
                self._known[caller.workspace_id] = (version, config)
                self._known.move_to_end(caller.workspace_id)
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        return config


def is_allowed(caller: Caller, name: str) -> bool:
    """Whether the caller may ask for this name; an alias grants its targets."""
    return caller.models is None or _matches(name, caller.models)


def resolve(config: Config, name: str) -> list[Target]:
    """The targets of one model name: `prefix/model`, or a bare name. Best first, no alias."""
    if name not in config.found:
        if len(config.found) >= KEPT:
            config.found.clear()
        config.found[name] = _served_by(config, name)
    model, keys = config.found[name]
    return [Target(key, model) for key in _ordered(keys)]


def _served_by(config: Config, name: str) -> tuple[str, list[Key]]:
    prefix, slash, rest = name.partition("/")
    if slash and rest:
        keys = [key for key in config.keys if key.name == prefix]
        keys = keys or [key for key in config.keys if key.provider == prefix]
        if keys:
            return rest, [key for key in keys if key.serves(rest)]
    return name, _bare_keys(config, name)


def _targets(config: Config, name: str) -> list[Target]:
    alias = config.routes.get(name)
    if alias is None:
        return resolve(config, name)
    steps = list(enumerate(alias))
    ordered = _drawn(
        steps, lambda step: step[1].get("priority", step[0]), lambda step: step[1].get("weight", 1)
    )
    return [target for _, step in ordered for target in resolve(config, step["model"])]


def _bare_keys(config: Config, name: str) -> list[Key]:
    """Keys that name the model, else the keys of its provider, else the only key there is."""
    named = [key for key in config.keys if key.models is not None and key.serves(name)]
    if named:
        return named
    provider = catalog.provider_for_model(name)
    owned = [key for key in config.keys if key.provider == provider and key.serves(name)]
    if owned or len(config.keys) != 1:
        return owned
    return [key for key in config.keys if key.serves(name)]


def _ordered(keys: list[Key]) -> list[Key]:
    return keys if len(keys) < 2 else _drawn(keys, lambda key: key.priority, lambda key: key.weight)


def _drawn(things: list[Any], priority: Any, weight: Any) -> list[Any]:
    """By priority, lower first; those of equal priority drawn by weight."""
    # The k-th root of a uniform number orders a draw without replacement (Efraimidis and Spirakis, 2006).
    return sorted(things, key=lambda thing: (priority(thing), -(random.random() ** (1 / weight(thing)))))  # noqa: S311


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _explain(config: Config, names: Sequence[str]) -> str:
    asked = f"The model '{names[0]}' does not exist here"
    if not config.keys:
        return f"{asked}: this workspace has no enabled provider key yet."
    providers = sorted({key.name or key.provider for key in config.keys})
    return f"{asked}: no provider key serves it. This workspace has keys for: {', '.join(providers)}."


def _select(connection: Connection, workspace_id: str) -> tuple[int, Config]:
    """The version is read before the keys: a write in between makes the next call read again."""
    workspace = connection.execute(
        sa.select(Workspace.config_version, Workspace.routes).where(Workspace.id == workspace_id)
    ).one_or_none()
    rows = connection.execute(
        sa.select(ProviderKey.__table__).where(ProviderKey.workspace_id == workspace_id, ProviderKey.enabled)
    ).mappings()
    keys = [
        Key(
            id=row["id"],
            workspace_id=row["workspace_id"],
            provider=row["provider"],
            name=row["name"],
            base_url=row["resolved_base_url"],
            sealed=row["sealed"],
            models=tuple(row["models"]) if row["models"] is not None else None,
            priority=row["priority"],
            weight=row["weight"],
            created_at=row["created_at"],
            prices=Overrides(row["prices"]),
        )
        for row in rows
        if row["provider"] in catalog.CATALOG and catalog.adapter(row["provider"]) is not None
    ]
    if workspace is None:
        return 0, Config(tuple(keys), {})
    return workspace.config_version, Config(tuple(keys), workspace.routes)
