import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.metadata import version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetuo import price_list
from perpetuo.price_list import LIBRARY_NAMES, Overrides, context_of, context_window, price_for
from perpetuo.pricing import cost
from perpetuo.providers.base import Usage
from perpetuo.providers.catalog import CATALOG
from perpetuo.schemas import CreateProviderKey, parse

DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
GLOBS = ["*", "gpt-*", "gpt-4*", "gpt-4o*", "gpt-4?", "gpt-4[ao]", "*o", "gpt-4o", "gpt-[4]o*", "g?t-4o*"]
TABLE = {glob: {"input": number, "output": number} for number, glob in enumerate(GLOBS, 1)}


def plain(number):
    return {"input": number, "output": number}


def test_every_provider_of_the_catalogue_has_a_list_or_serves_models_of_its_owner():
    assert set(CATALOG) - set(LIBRARY_NAMES) == {"ollama", "vllm", "custom"}
    assert set(LIBRARY_NAMES) <= set(CATALOG)


@pytest.mark.parametrize("provider", LIBRARY_NAMES)
def test_each_model_costs_what_the_library_says(provider):
    from genai_prices.types import Usage as Counted

    counted = Counted(
        input_tokens=150_001, output_tokens=77, cache_read_tokens=30_001, cache_write_tokens=501
    )
    usage = Usage(150_001, 77, 150_078, 30_001, 501)
    listed = price_list._list().providers[provider]
    priced = 0
    for model in listed.models:
        price = price_list._price(model, model.get_prices(DAY), "")
        if price is not None:
            usd = model.get_prices(DAY).calc_price(counted)["total_price"]
            assert abs(cost(usage, price).nano - usd * 10**9) <= 2, model.id
            priced += 1
    assert priced > len(listed.models) * 0.7


@pytest.mark.parametrize("provider", ["ollama", "vllm", "custom"])
def test_a_server_of_ones_own_has_no_price_but_the_owners(provider):
    assert price_for(provider, "gpt-4o", None, DAY) is None
    assert price_for(provider, "gpt-4o", Overrides({"gpt-*": plain(2)}), DAY).rates.input == 2


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "no-such-model"),
        ("openai", "gpt-4o-mini-foo"),
        ("openai", ""),
        ("openai", "whisper-1"),  # by the hour
        ("mistral", "mistral-ocr-latest"),  # by the page
        ("gemini", "gemini-2.5-flash-image"),  # pictures at twelve times the price of text
        ("openai", "gpt-audio"),
        ("openrouter", "stealth/crouton-alpha"),  # an entry without any price
        ("azure", "my-own-deployment"),
    ],
)
def test_what_has_no_known_price_has_none(provider, model):
    assert price_for(provider, model, None, DAY) is None


@pytest.mark.parametrize(
    ("provider", "model", "tokens"),
    [
        ("openai", "gpt-4o-2024-11-20", 128_000),
        ("openai", "gpt-4", 8_192),
        ("azure", "gpt-4o", 128_000),
        ("openai", "nobodys-model", None),
        ("custom", "gpt-4o", None),
        ("openai", "gpt-4o" + "o" * 10_000, None),
    ],
)
def test_a_models_window_is_what_the_library_says(provider, model, tokens):
    assert context_window(provider, model) == tokens


def test_the_source_is_named():
    assert price_for("openai", "gpt-4o", None, DAY).source == f"genai-prices {version('genai-prices')}"
    assert price_for("openai", "gpt-4o", Overrides({"*": plain(1)}), DAY).source == "override"


def test_hours_count_although_prices_are_remembered():
    night = DAY.replace(hour=16, minute=30)
    first = price_for("deepseek", "deepseek-chat", None, night - timedelta(microseconds=1))
    assert price_for("deepseek", "deepseek-chat", None, night).rates.input < first.rates.input
    assert price_for("deepseek", "deepseek-chat", None, DAY) == first
    assert price_for("deepseek", "deepseek-chat", None, DAY + timedelta(days=1)) == first


def test_a_service_tier_has_its_price_where_the_library_knows_it():
    flex, priority = context_of({"service_tier": "flex"}), context_of({"service_tier": "priority"})
    standard = price_for("openai", "gpt-5", None, DAY)
    assert price_for("openai", "gpt-5", None, DAY, flex).rates.output == standard.rates.output / 2
    assert price_for("openai", "gpt-5", None, DAY, priority).rates.output == standard.rates.output * 2
    assert price_for("openai", "gpt-5", None, DAY, flex).source.endswith(", service_tier=flex")
    assert price_for("groq", "openai/gpt-oss-20b", None, DAY, flex).source.endswith(version("genai-prices"))
    assert price_for("azure", "gpt-5", None, DAY, flex) == price_for("azure", "gpt-5", None, DAY)


@pytest.mark.parametrize("tier", ["auto", "invented", "", None, 3, ["flex"], {"flex": 1}])
def test_a_service_tier_that_the_library_does_not_know_changes_nothing(tier):
    assert context_of({"service_tier": tier}) == ()


@pytest.mark.parametrize(
    ("model", "glob"),
    [
        ("gpt-4o", "gpt-4o"),  # the name itself
        ("gpt-4o-mini", "gpt-4o*"),  # six literal characters
        ("gpt-4a", "gpt-4[ao]"),  # five, and longer than gpt-4?
        ("gpt-4x", "gpt-4?"),  # five, and one that is any, not any number
        ("gpt-4.1", "gpt-4*"),
        ("gpt-5", "gpt-*"),
        ("foo", "*o"),
        ("claude", "*"),
    ],
)
def test_the_most_specific_override_counts(model, glob):
    assert Overrides(TABLE).price(model).rates.input == TABLE[glob]["input"]


@settings(deadline=None)  # the machine may be busy
@given(st.permutations(list(TABLE)), st.sampled_from(["gpt-4o", "gpt-4o-mini", "gpt-4a", "gpt-4x", "o", "x"]))
def test_the_order_of_the_table_does_not_count(names, model):
    assert Overrides({name: TABLE[name] for name in names}).price(model) == Overrides(TABLE).price(model)


def test_overrides_come_before_the_list_and_leave_the_rest_to_it():
    own = Overrides({"gpt-4o": plain(7)})
    assert price_for("openai", "gpt-4o", own, DAY).rates.input == 7
    assert price_for("openai", "gpt-4o-mini", own, DAY) == price_for("openai", "gpt-4o-mini", None, DAY)


def test_an_override_of_nothing_is_free_and_not_unknown():
    price = Overrides({"*": plain(0)}).price("any")
    assert price is not None
    assert cost(Usage(100, 10, 110), price).nano == 0


def test_cache_classes_of_an_override_default_to_input():
    rates = Overrides({"m": {"input": 2.5, "output": 10, "cached_input": 0}}).price("m").rates
    assert rates == (Decimal("2.5"), Decimal(0), Decimal("2.5"), Decimal(10))


def test_an_override_keeps_the_digits_that_were_typed():
    text = '{"m": {"input": 0.1, "cached_input": 0.000000001, "cache_write": 999999.123456789, "output": 3}}'
    body = {"provider": "openai", "api_key": "x", "prices": text}
    prices = parse(CreateProviderKey, body, form=True).changes()["prices"]
    assert [str(rate) for rate in Overrides(prices).price("m").rates] == [
        "0.1",
        "1E-9",
        "999999.123456789",
        "3",
    ]


@pytest.mark.parametrize("table", [None, {}])
def test_no_table_is_no_override(table):
    assert Overrides(table).price("gpt-4o") is None


def test_invented_names_do_not_fill_the_memory():
    own = Overrides({"*": plain(1)})
    for number in range(price_list.MOST_KEPT + 10):
        own.price(f"model-{number}")
    assert len(own._found) <= price_list.MOST_KEPT
    before = price_list._listed.cache_info().currsize, price_list._find.cache_info().currsize
    assert price_for("openai", "gpt-4o" * 1000, None, DAY) is None
    assert own.price("x" * 10**6) is not None
    assert (price_list._listed.cache_info().currsize, price_list._find.cache_info().currsize) == before
    assert max(map(len, own._found)) <= price_list.LONGEST_NAME
    assert (
        price_list._listed.cache_info().maxsize
        == price_list._find.cache_info().maxsize
        == price_list.MOST_KEPT
    )


def test_loading_brings_no_http_client_no_thread_and_no_second_copy():
    code = """
import socket, sys, threading
def refuse(*args): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from perpetuo import price_list
had = "httpx2" in sys.modules
price_list.load()
assert price_list._find.cache_info().currsize == 1
before = set(sys.modules)
from datetime import UTC, datetime
price_list.price_for("anthropic", "claude-sonnet-4-5", None, datetime.now(UTC), (("speed", "fast"),))
assert set(sys.modules) == before, set(sys.modules) - before
assert had or "httpx2" not in sys.modules
assert "genai_prices.data" not in sys.modules and threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
