"""What an API key may use: the workspace's aliases and its provider keys' models, upstream lists included."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import monotonic

from perpetuo.errors import Unavailable
from perpetuo.gateway.access import Caller
from perpetuo.gateway.router import Config, Key, Router, is_allowed, resolve
from perpetuo.gateway.upstream import Upstream

KEPT_SECONDS = 300.0  # then it is asked for again; the last one serves so much longer while that fails
AWAY_SECONDS = 30.0  # how long a list that could not be had is not asked for again
KEPT = 1000


@dataclass(frozen=True, slots=True)
class Offer:
    """One model id that may be asked for."""

    id: str
    owned_by: str
    created: int  # seconds since 1970: when its provider key was made


@dataclass(frozen=True, slots=True)
class _Listed:
    """What an upstream listed, or nothing. Times are `monotonic()`."""

    names: tuple[str, ...]
    ask_at: float
    good_until: float


class Offers:
    def __init__(self, router: Router, upstream: Upstream) -> None:
        self._router = router
        self._upstream = upstream
        self._lists: dict[tuple[str, str], _Listed] = {}  # by key and its secret
        self._probes: dict[tuple[str, str], threading.Thread] = {}  # those in flight
        self._lock = threading.Lock()

    def all(self, caller: Caller) -> list[Offer]:
        """By id. An upstream that has been away for five minutes is left out. Raises Unavailable."""
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
        for probe in [self._probe(key) for key in keys]:
            if probe is not None:
                probe.join()
        return {key.id: self._names(key) for key in keys}

    def _names(self, key: Key) -> tuple[str, ...]:
        listed = self._lists.get((key.id, key.sealed))
        return listed.names if listed is not None and monotonic() < listed.good_until else ()

    def _probe(self, key: Key) -> threading.Thread | None:
        """The probe to wait for, one at a time for each key; None where a list is there."""
        ident = (key.id, key.sealed)
        with self._lock:
            listed = self._lists.get(ident)
            if listed is not None and monotonic() < listed.ask_at:
                return None
            if ident in self._probes:
                return None if self._names(key) else self._probes[ident]
            probe = threading.Thread(target=self._fetch, args=(key,), daemon=True)
            probe.start()
            self._probes[ident] = probe
            return probe

    def _fetch(self, key: Key) -> None:
        ident, names = (key.id, key.sealed), None
        try:
            names = self._upstream.probe(key.provider, key.base_url, self._upstream.open_secret(key)).models
        except (Unavailable, ValueError):  # its secret does not open, or cannot stand in a header
            pass
        finally:
            with self._lock:
                self._keep(ident, names)
                del self._probes[ident]

    def _keep(self, ident: tuple[str, str], names: list[str] | None) -> None:
        now, last = monotonic(), self._lists.pop(ident, None)
        if len(self._lists) >= KEPT:
            del self._lists[next(iter(self._lists))]
        if names is not None:
            self._lists[ident] = _Listed(tuple(names), now + KEPT_SECONDS, now + 2 * KEPT_SECONDS)
        else:
            last = last or _Listed((), now, now)
            self._lists[ident] = _Listed(last.names, now + AWAY_SECONDS, last.good_until)


def _asked_as(config: Config, key: Key, name: str) -> str:
    """The bare name where that reaches the key, else with the key's prefix."""
    if any(target.key.id == key.id and target.model == name for target in resolve(config, name)):
        return name
    return f"{key.name or key.provider}/{name}"


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")
