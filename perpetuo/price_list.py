"""Where prices come from: a provider key's own table, else the data that genai-prices brings along.

No network and no thread. The library's matching of names, dates, hours, tiers and variants is used as it is;
kept are only the providers of our catalogue, and of them only what prices need.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from fnmatch import translate
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from perpetuo.pricing import Price, Rates, Tier

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

# Names of our catalogue to those of genai-prices. `ollama`, `vllm` and `custom` have none: who runs the
# server pays for it in other ways, and a model called gpt-4o there is not OpenAI's. A table of the
# provider key's own (`prices`) can give them one.
LIBRARY_NAMES = {
    "openai": "openai",
    "anthropic": "anthropic",
    "groq": "groq",
    "mistral": "mistral",
    "together": "together",
    "openrouter": "openrouter",
    "deepseek": "deepseek",
    "xai": "x-ai",
    "gemini": "google",
    "fireworks": "fireworks",
    "azure": "azure",
}
CONTEXT_FIELDS = ("service_tier", "speed")  # of a request: what it asks for at another price
TEXT_OUTPUT = {"output_mtok", "output_reasoning_mtok"}
LONGEST_NAME = 200  # no model has a longer one, and invented names must not fill the memory
MOST_KEPT = 4096

Context = tuple[tuple[str, str], ...]


class Overrides:
    """A provider key's `prices`, made ready once and asked often.

    The name itself comes first, then the glob with the most literal characters, then the one with fewer `*`,
    then the longer, then the alphabet: never the order in which the table was written.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Any]] | None) -> None:
        prices = {name: _own_price(rates) for name, rates in (table or {}).items()}
        self._exact = prices
        self._globs = [
            (re.compile(translate(name)), prices[name])
            for name in sorted(prices, key=_specificity)
            if set(name) & set("*?[")
        ]
        self._found: dict[str, Price | None] = {}

    def price(self, model: str) -> Price | None:
        if not self._exact:
            return None
        if model in self._found:
            return self._found[model]
        price = self._exact.get(model) or next(
            (price for glob, price in self._globs if glob.match(model)), None
        )
        if len(model) <= LONGEST_NAME:
            if len(self._found) >= MOST_KEPT:
                self._found.clear()
            self._found[model] = price
        return price


def _specificity(glob: str) -> tuple[int, int, int, str]:
    literal = re.sub(r"\[.+?\]|[*?]", "", glob)
    return -len(literal), glob.count("*"), -len(glob), glob


def _own_price(own: Mapping[str, Any]) -> Price:
    """Both cache classes default to `input`. A float's shortest form is what the owner typed."""
    exact = {name: Decimal(str(rate)) for name, rate in own.items() if rate is not None}
    plain = exact["input"]
    rates = Rates(plain, exact.get("cached_input", plain), exact.get("cache_write", plain), exact["output"])
    return Price(rates, "override")


def load() -> None:
    """Reads the bundled prices and prices once, so that no request waits for it: about 50 ms, then kept."""
    price_for("openai", "gpt-4o-mini", None, datetime.now(UTC))


def context_of(fields: Mapping[str, Any]) -> Context:
    """What in a request's fields changes its price, as far as the library knows that value."""
    asked = ((name, fields.get(name)) for name in CONTEXT_FIELDS)
    known = _list().contexts
    return tuple((name, value) for name, value in asked if isinstance(value, str) and (name, value) in known)


def price_for(
    provider: str, model: str, overrides: Overrides | None, at: datetime, context: Context = ()
) -> Price | None:
    """The price of one call, to be stored with its row at open; None where none is known.

    `provider` is a name of our catalogue, `model` the name asked of the upstream, `at` aware, `context` from
    `context_of`. An owner's own price knows no context. The upstream may answer in another service tier than
    asked; the price is that of the one asked for. About 1 µs once known.
    """
    own = overrides.price(model) if overrides is not None else None
    if own is not None or provider not in LIBRARY_NAMES or len(model) > LONGEST_NAME:
        return own
    return _listed(provider, model, context, int(at.timestamp()) // 60)


def context_window(provider: str, model: str) -> int | None:
    """The most tokens of input that a model takes; None where nobody says."""
    if provider not in LIBRARY_NAMES or len(model) > LONGEST_NAME:
        return None
    found = _find(provider, model)
    return found.context_window if found else None


@lru_cache(MOST_KEPT)
def _listed(provider: str, model: str, context: Context, minute: int) -> Price | None:
    """Prices change at days and at hours of the day, never within a minute."""
    found = _find(provider, model)
    if found is None:
        return None
    at = datetime.fromtimestamp(minute * 60, UTC)
    source = _list().source
    price = _price(found, found.get_prices(at), source)
    # The library's own rule: a model found in another provider's list has that one's standard prices only.
    if price is None or not context or all(found is not own for own in _list().providers[provider].models):
        return price
    asked = ", ".join(f"{name}={value}" for name, value in context)
    special = _price(found, found.get_prices(at, dict(context)), f"{source}, {asked}")
    return price if special and (special.rates, special.tiers) == (price.rates, price.tiers) else special


@lru_cache(MOST_KEPT)
def _find(provider: str, model: str) -> ModelInfo | None:
    known = _list()
    name = model.removeprefix("models/") if provider == "gemini" else model
    return known.providers[provider].find_model(name, all_providers=known.everyone)


def _price(model: ModelInfo, prices: ModelPrice, source: str) -> Price | None:
    """None where our usage does not say what is billed: hours of speech, pages, and answers of sound or
    pictures, which cost several times what text does and are not counted apart. An entry without any price
    is free only if its name says so; it may as well be one that the data cannot express."""
    if prices.input_mtok is None:
        is_free = model.id.endswith(":free") and not vars(prices)
        return Price(Rates(*[Decimal(0)] * len(Rates._fields)), source) if is_free else None
    if any(name.startswith("output_") for name in vars(prices).keys() - TEXT_OUTPUT):
        return None
    starts = {tier.start for price in _classes(prices) if _is_tiered(price) for tier in price.tiers}
    tiers = tuple(Tier(start, _rates(prices, start + 1)) for start in sorted(starts))
    return Price(_rates(prices, 0), source, tiers)


def _classes(prices: ModelPrice) -> tuple[Any, ...]:
    """Input, cached input, cache write, output. The library counts a class without a price as plain input;
    what has no output price (embeddings) has no output."""
    written, read = prices.cache_write_mtok, prices.cache_read_mtok
    return (
        prices.input_mtok,
        prices.input_mtok if read is None else read,
        prices.input_mtok if written is None else written,
        Decimal(0) if prices.output_mtok is None else prices.output_mtok,
    )


def _rates(prices: ModelPrice, input_tokens: int) -> Rates:
    calc_unit_price = sys.modules["genai_prices.types"].calc_unit_price
    return Rates(*(calc_unit_price(price, 1, input_tokens, 1) for price in _classes(prices)))


def _is_tiered(price: Decimal | TieredPrices | None) -> bool:
    return hasattr(price, "tiers")


class _List(NamedTuple):
    providers: dict[str, Provider]  # by our names
    everyone: list[Provider]  # and those whose lists they fall back to
    contexts: frozenset[tuple[str, str]]
    source: str


@cache
def _list() -> _List:
    """The bundled data, without the package's own first module: that one imports an HTTP client for updates
    over the network, which we do not want (1.8 MiB and 25 ms a process, and a second way out)."""
    spec = find_spec("genai_prices")
    if spec is None:
        raise ModuleNotFoundError("genai_prices")
    package = sys.modules.setdefault("genai_prices", module_from_spec(spec))
    by_name = {found.id: found for found in importlib.import_module("genai_prices.data").providers}
    # All other providers go with the module, once nothing names it any more.
    sys.modules.pop("genai_prices.data", None)
    vars(package).pop("data", None)
    providers = {ours: by_name[theirs] for ours, theirs in LIBRARY_NAMES.items()}
    fallbacks = [name for found in providers.values() for name in found.fallback_model_providers or ()]
    everyone = [by_name[name] for name in dict.fromkeys([*LIBRARY_NAMES.values(), *fallbacks])]
    for found in everyone:
        _strip(found)
    variants = [each for found in everyone for model in found.models for each in model.price_variants or ()]
    contexts = {pair for each in variants for pair in each.when.items() if pair[0] in CONTEXT_FIELDS}
    return _List(providers, everyone, frozenset(contexts), f"genai-prices {version('genai-prices')}")


def _strip(provider: Provider) -> None:
    provider.extractors = provider.description = provider.price_comments = provider.pricing_urls = None
    for model in provider.models:
        model.name = model.description = model.price_comments = None
