"""What an API key may use: the workspace's aliases and its provider keys' models, upstream lists included."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import monotonic

from perpetuo.errors import Unavailable
from perpetuo.gateway.access import Caller
from perpetuo.gateway.router import Config, Key, Router, is_allowed, resolve
from perpetuo.gateway.upstream import Upstream

KEPT_SECONDS = 300.0
AWAY_SECONDS = 30.0  # how long a list that could not be had is not asked for again
KEPT = 1000


@dataclass(frozen=True, slots=True)
class Offer:
    """One model id that may be asked for."""

    id: str
    owned_by: str
    created: int  # seconds since 1970: when its provider key was made


class Offers:
    def __init__(self, router: Router, upstream: Upstream) -> None:
        self._router = router
        self._upstream = upstream
        self._lists: dict[tuple[str, str], tuple[float, tuple[str, ...]]] = {}  # by key and its secret

    def all(self, caller: Caller) -> list[Offer]:
        """By id. An upstream that is away is left out. Raises Unavailable."""
        config = self._router.config(caller)
        lists = self._upstream_lists(config.keys)
        offers = {alias: Offer(alias, "perpetuo", 0) for alias in config.routes}
        for key in config.keys:
            named = [name for name in key.models or () if not _is_glob(name)]
            for name in [*named, *(name for name in lists[key.id] if key.serves(name))]:
                offer = Offer(_asked_as(config, key, name), key.provider, int(key.created_at.timestamp()))
                offers.setdefault(offer.id, offer)
        return [offers[name] for name in sorted(offers) if is_allowed(caller, name)]

    def find(self, caller: Caller, name: str) -> Offer | None:
        """One of them, by its id or by another name that leads to it. Raises Unavailable."""
        offers = {offer.id: offer for offer in self.all(caller)}
        if name in offers or not is_allowed(caller, name):
            return offers.get(name)
        config = self._router.config(caller)
        for target in resolve(config, name):
            offer = offers.get(_asked_as(config, target.key, target.model))
            if offer is not None:
                return Offer(name, offer.owned_by, offer.created)
        return None

    def _upstream_lists(self, keys: tuple[Key, ...]) -> dict[str, tuple[str, ...]]:
        """By key the names that its upstream lists; those not known are asked for at the same time."""
        missing = [key for key in keys if self._lists.get((key.id, key.sealed), (0.0,))[0] <= monotonic()]
        threads = [threading.Thread(target=self._fetch, args=(key,), daemon=True) for key in missing]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {key.id: self._lists.get((key.id, key.sealed), (0.0, ()))[1] for key in keys}

    def _fetch(self, key: Key) -> None:
        try:
            probe = self._upstream.probe(key.provider, key.base_url, self._upstream.open_secret(key))
        except Unavailable:  # its secret does not open
            names = None
        else:
            names = probe.models
        if len(self._lists) >= KEPT:
            self._lists.clear()
        until = monotonic() + (AWAY_SECONDS if names is None else KEPT_SECONDS)
        self._lists[key.id, key.sealed] = (until, tuple(names or ()))


def _asked_as(config: Config, key: Key, name: str) -> str:
    """The bare name where that reaches the key, else with the key's prefix."""
    if any(target.key.id == key.id and target.model == name for target in resolve(config, name)):
        return name
    return f"{key.name or key.provider}/{name}"


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")
