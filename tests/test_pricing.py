import json
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetuo import wire
from perpetuo.fields import MOST_PRICE_USD, moment
from perpetuo.price_list import context_of, price_for
from perpetuo.pricing import MOST_TOKENS, Price, Rates, Tier, bound, cost
from perpetuo.providers import catalog
from perpetuo.providers.anthropic import Anthropic
from perpetuo.providers.base import ModelRequest, Usage

GOLDEN = json.loads((Path(__file__).parent / "prices" / "golden.json").read_text())
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "."}, "finish_reason": "stop"}
TEXT = {"type": "text", "text": "."}
ANSWERS = {
    "chat.completions": {"id": "1", "object": "chat.completion", "created": 1, "choices": [CHOICE]},
    "embeddings": {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]},
    "responses": {"output": [{"type": "message", "content": [{"type": "output_text", "text": "."}]}]},
    "anthropic": {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "content": [TEXT],
        "stop_reason": "end_turn",
    },
}
MOST_BIGINT = 2**63 - 1
RATE = st.decimals(0, MOST_PRICE_USD, allow_nan=False, allow_infinity=False, places=9) | st.decimals(
    0, 100, allow_nan=False, allow_infinity=False, places=18
)
RATES = st.builds(Rates, RATE, RATE, RATE, RATE)
TIERS = st.lists(
    st.builds(Tier, st.integers(0, 10**6), RATES), max_size=3, unique_by=lambda tier: tier.above
).map(lambda tiers: tuple(sorted(tiers, key=lambda tier: tier.above)))
PRICES = st.builds(Price, RATES, st.just("override"), TIERS)
COUNT = st.integers(0, 2 * 10**6) | st.integers(0, MOST_TOKENS)
ANY = st.integers(-(2**70), 2**70)


@st.composite
def usages(draw, most_prompt=COUNT, most_completion=COUNT):
    prompt, completion = draw(most_prompt), draw(most_completion)
    cached = draw(st.integers(0, prompt))
    written = draw(st.integers(0, prompt - cached))
    return Usage(prompt, completion, prompt + completion, cached, written)


def usage_of(case):
    """As the provider's adapter reads it from a whole answer."""
    endpoint = case.get("endpoint", "chat.completions")
    answer = {
        "model": case["model"],
        "usage": case["usage"],
        **ANSWERS.get(case["provider"], ANSWERS[endpoint]),
    }
    fields = {"model": case["model"], "messages": [{"role": "user", "content": "?"}], "input": "?"}
    request = ModelRequest(endpoint, case["model"], json.dumps(fields).encode(), fields)
    adapter = catalog.adapter(case["provider"]) or Anthropic()
    usage = adapter.read_answer(request, json.dumps(answer).encode()).usage
    assert usage.source == "provider"
    return usage


def price_of(case):
    context = context_of(case.get("fields", {}))
    return price_for(case["provider"], case["model"], None, moment(case["at"]), context)


def library_usd(case):
    """What genai-prices itself makes of it, unrounded."""
    from importlib import import_module

    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import Usage as Counted

    usage = usage_of(case)
    counted = Counted(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )
    provider = {"gemini": "google", "xai": "x-ai"}.get(case["provider"], case["provider"])
    snapshot = DataSnapshot(providers=import_module("genai_prices.data").providers, from_auto_update=False)
    name = case["model"].removeprefix("models/")
    return snapshot.calc(counted, name, provider, None, moment(case["at"]), case.get("fields")).total_price


def exactly(tokens, rate):
    """Nano-dollars, rounded half up, by another road."""
    return floor(tokens * Fraction(rate) * 1000 + Fraction(1, 2))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["case"])
def test_cost_is_what_a_person_works_out(case):
    found = cost(usage_of(case), price_of(case))
    lines = [
        [line.name, line.tokens, str(line.usd_per_million), line.nano] for line in found.lines if line.tokens
    ]
    assert lines == case["lines"]
    assert found.nano == case["nano"] == sum(line[3] for line in case["lines"])
    assert not found.clamped


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["case"])
def test_cost_is_what_the_library_makes_of_it_up_to_rounding(case):
    apart = abs(cost(usage_of(case), price_of(case)).nano - library_usd(case) * 10**9)
    assert apart <= Decimal("0.5") * len(case["lines"])


def test_the_arithmetic_of_the_log_detail_adds_up():
    case = GOLDEN[0]
    lines = cost(usage_of(case), price_of(case)).arithmetic()
    assert json.loads(wire.to_json(lines)) == [
        {"class": "input", "tokens": 86, "usd_per_million": 0.15, "usd": 0.0000129},
        {"class": "cached_input", "tokens": 1920, "usd_per_million": 0.075, "usd": 0.000144},
        {"class": "output", "tokens": 300, "usd_per_million": 0.6, "usd": 0.00018},
    ]
    assert sum(line["usd"] for line in lines) == wire.usd(case["nano"])


@settings(deadline=None)  # the machine may be busy
@given(usages(), PRICES)
def test_each_class_is_rounded_half_up_and_the_cost_is_their_sum(usage, price):
    rates = price.rates
    for tier in price.tiers:
        rates = tier.rates if usage.prompt_tokens > tier.above else rates
    plain = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
    counts = (plain, usage.cached_tokens, usage.cache_write_tokens, usage.completion_tokens)
    found = cost(usage, price)
    assert [line.nano for line in found.lines] == [exactly(*pair) for pair in zip(counts, rates, strict=True)]
    assert found.nano == sum(line.nano for line in found.lines)
    assert sum(line["usd"] for line in found.arithmetic()) == wire.usd(found.nano)
    assert 0 <= found.nano <= MOST_BIGINT


@settings(deadline=None)  # the machine may be busy
@given(st.builds(Usage, ANY, ANY, ANY, ANY, ANY, ANY), PRICES)
def test_counts_that_make_no_sense_are_cut_and_named(usage, price):
    found = cost(usage, price)
    assert 0 <= found.nano <= MOST_BIGINT
    assert all(0 <= line.tokens <= MOST_TOKENS for line in found.lines)
    plain, cached, written, completion = (line.tokens for line in found.lines)
    cut = replace(
        usage,
        prompt_tokens=plain + cached + written,
        cached_tokens=cached,
        cache_write_tokens=written,
        completion_tokens=completion,
    )
    assert cost(cut, price) == replace(found, clamped=())
    assert set(found.clamped) == {
        name for name in Usage.__slots__ if getattr(cut, name) != getattr(usage, name)
    }


@pytest.mark.parametrize(
    ("usage", "tokens", "clamped"),
    [
        (Usage(100, 10, 110, cached_tokens=120), [0, 100, 0, 10], ("cached_tokens",)),
        (Usage(100, 10, 110, 80, 50), [0, 80, 20, 10], ("cache_write_tokens",)),
        (Usage(-5, -1, 0), [0, 0, 0, 0], ("prompt_tokens", "completion_tokens")),
        (Usage(100, 10, 110, cached_tokens=-3), [100, 0, 0, 10], ("cached_tokens",)),
        (Usage(MOST_TOKENS + 1, 0, 0), [MOST_TOKENS, 0, 0, 0], ("prompt_tokens",)),
        (Usage(100, 10, 7), [100, 0, 0, 10], ()),
    ],
)
def test_a_part_is_never_more_than_its_whole(usage, tokens, clamped):
    found = cost(usage, Price(Rates(*[Decimal(1)] * 4), "override"))
    assert [line.tokens for line in found.lines] == tokens
    assert found.clamped == clamped


@settings(deadline=None)  # the machine may be busy
@given(st.data(), PRICES, COUNT, COUNT)
def test_no_usage_within_the_counts_costs_more_than_the_bound(data, price, prompt, completion):
    usage = data.draw(usages(st.integers(0, prompt), st.integers(0, completion)))
    assert cost(usage, price).nano <= bound(price, prompt, completion) <= MOST_BIGINT


@settings(deadline=None)  # the machine may be busy
@given(PRICES, COUNT, COUNT, COUNT, COUNT)
def test_the_bound_never_falls_as_tokens_rise(price, prompt, more_prompt, completion, more_completion):
    lower = bound(price, prompt, completion)
    assert lower <= bound(price, prompt + more_prompt, completion + more_completion)


@settings(deadline=None)  # the machine may be busy
@given(PRICES, ANY, ANY)
def test_the_bound_of_any_counts_fits_the_column(price, prompt, completion):
    assert 0 <= bound(price, prompt, completion) <= MOST_BIGINT


def test_the_bound_takes_the_dearest_class_of_the_tiers_within_reach():
    base = Rates(Decimal(3), Decimal("0.3"), Decimal("3.75"), Decimal(15))
    above = Rates(Decimal(6), Decimal("0.6"), Decimal("7.5"), Decimal("22.5"))
    price = Price(base, "override", (Tier(200_000, above),))
    assert bound(price, 200_000, 10) == 200_000 * 3750 + 10 * 15_000
    assert bound(price, 200_001, 10) == 200_001 * 7500 + 10 * 22_500
    cheaper_above = Price(above, "override", (Tier(200_000, base),))
    assert bound(cheaper_above, 300_000, 10) == 300_000 * 7500 + 10 * 22_500


@settings(deadline=None)  # the machine may be busy
@given(PRICES)
def test_a_price_comes_back_from_the_row_exactly(price):
    stored = json.loads(wire.to_json(price.to_json()))
    assert Price.from_json(stored) == price
    assert Price.from_json(json.loads(json.dumps(price.to_json()))) == price


def test_a_stored_price_has_no_floats():
    price = Price(
        Rates(Decimal("1E-9"), Decimal("0.10"), Decimal(0), Decimal(1_000_000)),
        "override",
        (Tier(5, Rates(*[Decimal(1)] * 4)),),
    )
    assert price.to_json() == {
        "source": "override",
        "input": "0.000000001",
        "cached_input": "0.10",
        "cache_write": "0",
        "output": "1000000",
        "tiers": [{"above": 5, "input": "1", "cached_input": "1", "cache_write": "1", "output": "1"}],
    }
