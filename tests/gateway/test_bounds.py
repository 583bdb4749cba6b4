import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetuo.errors import Forbidden
from perpetuo.gateway import boundable
from perpetuo.gateway.bounds import Bound, bound_of, demand_of
from perpetuo.gateway.intake import DECISIVE, check, parse
from perpetuo.gateway.router import Key, Target
from perpetuo.output_limits import FALLBACK
from perpetuo.price_list import Overrides
from perpetuo.pricing import Price, Rates, cost
from perpetuo.providers.base import Usage
from tests.test_pricing import PRICES, usages

AT = datetime(2026, 11, 20, 12, tzinfo=UTC)
OWN = {"*": {"input": 1, "output": 2}}
TEXT = [{"role": "user", "content": "Say hello"}]
SLACK = boundable.SLACK_TOKENS
PNG = "data:image/png;base64," + "A" * 50_000
PDF = "data:application/pdf;base64," + "A" * 500
FUNCTION = {"type": "function", "function": {"name": "f"}}


def asked(endpoint="chat.completions", **fields):
    base = {"chat.completions": {"messages": TEXT}, "embeddings": {"input": "a"}, "responses": {"input": "a"}}
    body = json.dumps({"model": "gpt-4o", **base[endpoint], **fields}).encode()
    return check(endpoint, body, parse(body), {})


def target(provider="openai", model="gpt-4o", prices=None):
    return Target(Key("1", "1", provider, None, "http://x", "", None, 0, 1, AT, Overrides(prices)), model)


def bounded(endpoint="chat.completions", provider="openai", model="gpt-4o", prices=None, **fields):
    return bound_of(asked(endpoint, **fields), target(provider, model, prices), AT)


def refused(endpoint="chat.completions", provider="openai", model="gpt-4o", prices=None, **fields):
    with pytest.raises(Forbidden) as caught:
        bounded(endpoint, provider, model, prices, **fields)
    assert (caught.value.status, caught.value.type) == (403, "permission_error")
    return caught.value.code, caught.value.param


def part(content, role="user"):
    return {"messages": [{"role": role, "content": [{"type": "text", "text": "?"}, content]}]}


BOUNDS = st.builds(
    lambda price, tokens, output, choices, predicted: Bound(
        price, tokens, output, choices, True, min(output, 256), predicted
    ),
    PRICES,
    st.integers(0, 3 * 10**6),
    st.integers(0, 200_000),
    st.integers(1, 20),
    st.integers(0, 10_000),
)


@settings(deadline=None)  # the machine may be busy
@given(BOUNDS, st.data())
def test_no_usage_within_a_bound_costs_more_than_its_hold(bound, data):
    most_output = bound.choices * bound.output_tokens + bound.predicted_tokens
    usage = data.draw(usages(st.integers(0, bound.input_tokens), st.integers(0, most_output)))
    assert cost(usage, bound.price).nano <= bound.nano()


@settings(deadline=None)  # the machine may be busy
@given(BOUNDS, st.data())
def test_what_fits_into_a_hold_is_what_was_held_for(bound, data):
    output = data.draw(st.integers(0, bound.output_tokens))
    assert output <= bound.output_within(bound.nano(output)) <= bound.output_tokens


@settings(deadline=None)  # the machine may be busy
@given(BOUNDS, st.integers(0, 10**16))
def test_what_fits_into_a_hold_costs_no_more_than_it(bound, nano):
    fitting = bound.output_within(nano)
    assert bound.nano(fitting) <= nano or fitting == 0


@settings(deadline=None)  # the machine may be busy
@given(BOUNDS, st.data())
def test_more_output_is_never_held_for_with_less(bound, data):
    less, more = sorted(data.draw(st.tuples(*[st.integers(0, bound.output_tokens)] * 2)))
    assert bound.nano(less) <= bound.nano(more) <= bound.nano()
    assert bound.output_within(bound.nano(less)) <= bound.output_within(bound.nano(more))


def test_text_is_bounded_by_its_bytes_and_a_slack():
    request = asked(max_tokens=100, n=3)
    bound = bound_of(request, target(), AT)
    assert bound.input_tokens == len(request.body) + SLACK
    assert (bound.output_tokens, bound.choices, bound.is_guess) == (100, 3, False)
    assert bound.nano() == (len(request.body) + SLACK) * 2_500 + 300 * 10_000
    assert bound.tokens == len(request.body) + SLACK + 300
    assert bound.nano(1) == bound.nano() - 3 * 99 * 10_000


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_completion_tokens": 10, "max_tokens": 20}, (10, False, 10)),
        ({"max_completion_tokens": None, "max_tokens": 20_000}, (20_000, False, 256)),
        ({}, (16_384, True, 256)),
        ({"max_tokens": 0}, (16_384, True, 256)),
        ({"max_tokens": -1}, (16_384, True, 256)),
        ({"max_tokens": "9000000"}, (16_384, True, 256)),
        ({"max_tokens": 1e6}, (16_384, True, 256)),
        ({"max_tokens": True}, (16_384, True, 256)),
        ({"max_completion_tokens": "x", "max_tokens": 7}, (16_384, True, 256)),
        ({"max_output_tokens": 7}, (16_384, True, 256)),
        ({"max_tokens": 10**12}, (10**12, False, 256)),
    ],
)
def test_the_output_is_the_clients_maximum_else_the_models(fields, expected):
    bound = bounded(**fields)
    assert (bound.output_tokens, bound.is_guess, bound.least_output_tokens) == expected


@pytest.mark.parametrize(("size", "room"), [(0, 8_192 - 1_024 - 400), (9_000, 3_500), (50_000, 256)])
def test_a_guess_leaves_the_input_its_room_in_the_models_window(size, room):
    bound = bounded(model="gpt-4", x="x" * size)
    assert bound.is_guess
    assert room <= bound.output_tokens <= 1.2 * room


def test_an_unknown_model_writes_no_more_than_what_is_sent_to_it():
    bound = bounded(provider="custom", model="x", prices=OWN)
    assert (bound.output_tokens, bound.is_guess) == (FALLBACK, True)


@pytest.mark.parametrize(
    ("n", "choices"),
    [(None, 1), (0, 1), (-3, 1), (1, 1), (128, 128), (2.5, 3), ("4", 4), ("x", 1), (True, 1), ([9], 1)],
)
def test_choices_are_counted_as_a_host_may_read_them(n, choices):
    assert bounded(n=n).choices == choices


@pytest.mark.parametrize("n", [10**30, "1e400", 1e300])
def test_a_vast_number_of_choices_is_a_vast_bound(n):
    assert bounded(n=n, max_tokens=1).nano() >= 10**9 * 10_000


def test_responses_have_a_maximum_of_their_own():
    bound = bounded("responses", max_output_tokens=50, max_tokens=7)
    assert (bound.output_tokens, bound.is_guess) == (50, False)
    assert bounded("responses", max_tokens=7).is_guess


def test_embeddings_have_no_output():
    bound = bounded("embeddings", model="text-embedding-3-small", max_tokens=9, n=4)
    assert (bound.output_tokens, bound.choices, bound.is_guess, bound.least_output_tokens) == (0, 1, False, 0)
    assert bound.output_within(bound.nano()) == 0


@pytest.mark.parametrize(
    ("provider", "model", "fields", "nano_per_input_token"),
    [
        ("anthropic", "claude-sonnet-4-5", {}, 3_750),  # a write to the cache
        ("anthropic", "claude-sonnet-4-5", {"cache_control": {"ttl": "1h"}}, 6_000),
        ("anthropic", "claude-sonnet-4-5", {"x": "a" * 250_000}, 7_500),  # the upper tier
        ("openai", "gpt-5", {"service_tier": "flex"}, 625),
        ("openai", "gpt-4o", {"service_tier": "auto"}, 2_500),
        ("openai", "gpt-5", {"service_tier": "priority"}, 2_500),
    ],
)
def test_the_input_is_held_at_its_dearest_class(provider, model, fields, nano_per_input_token):
    bound = bounded(provider=provider, model=model, max_tokens=1, **fields)
    assert bound.nano(0) == bound.input_tokens * nano_per_input_token


@pytest.mark.parametrize(
    ("provider", "model", "fields"),
    [
        ("openai", "nobodys-model", {}),
        ("custom", "gpt-4o", {}),
        ("openai", "gpt-4-turbo", {"service_tier": "priority"}),
        ("azure", "gpt-4o", {"service_tier": "priority"}),
        ("openai", "gpt-4o", {"service_tier": "unheard-of"}),
        ("anthropic", "claude-sonnet-4-5", {"speed": "fast"}),
        ("anthropic", "claude-opus-4-6", {"inference_geo": "us"}),
    ],
)
def test_what_has_no_known_price_is_refused(provider, model, fields):
    assert refused(provider=provider, model=model, **fields) == ("model_not_priced", "model")
    assert bounded(provider=provider, model=model, prices=OWN, **fields).price.source == "override"


@pytest.mark.parametrize(
    ("provider", "model"), [("anthropic", "claude-sonnet-4-5"), ("deepseek", "deepseek-chat")]
)
def test_a_service_tier_that_does_not_reach_the_host_has_no_price(provider, model):
    assert bounded(provider=provider, model=model, service_tier="priority").nano()


UNBOUNDABLE = [
    ({"web_search_options": {}}, "web_search_options"),
    ({"search_parameters": {}}, "search_parameters"),
    ({"plugins": [{"id": "web"}]}, "plugins"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"deferred": True}, "deferred"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"data_sources": [{}]}, "data_sources"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"container": {}}, "container"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"extra_body": {"google": {"cached_content": "cachedContents/1"}}}, "cached_content"),
    ({"tools": [FUNCTION, {"type": "web_search"}]}, "tools[1]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"tools": [{"google_search": {}}]}, "tools[0]"),
    ({"tools": [{"type": ["function"]}]}, "tools[0]"),
]


@pytest.mark.parametrize("endpoint", ["chat.completions", "responses"])
@pytest.mark.parametrize(("fields", "place"), UNBOUNDABLE)
def test_what_the_host_adds_by_itself_is_refused_by_name(endpoint, fields, place):
    assert refused(endpoint, **fields) == ("request_not_boundable", place)


@pytest.mark.parametrize(
    "fields",
    [
        {"web_search_options": None, "plugins": [], "background": False, "conversation": None},
        {"search_parameters": {"mode": "off"}},
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        {"extra_body": {"google": {"thinking_config": {"thinking_budget": 0}}}},
        {"tools": [FUNCTION, {"type": "custom", "name": "c"}, {"input_schema": {}}]},
        {"tools": None},
        {"reasoning_effort": "high", "store": True, "response_format": {"type": "json_object"}},
    ],
)
def test_what_asks_for_nothing_more_is_bounded(fields):
    request = asked(**fields)
    assert bound_of(request, target(), AT).input_tokens == len(request.body) + SLACK


@pytest.mark.parametrize(
    ("provider", "model"), [("anthropic", "claude-sonnet-4-5"), ("mistral", "mistral-small-latest")]
)
def test_a_hint_that_does_not_reach_the_host_is_no_fault(provider, model):
    assert bounded(provider=provider, model=model, web_search_options={}).nano()


@pytest.mark.parametrize(
    "model",
    ["gpt-4o-search-preview", "openai/gpt-4o:online", "o3-deep-research", "groq/compound-mini", "a@preset/b"],
)
def test_a_model_that_searches_by_itself_is_refused(model):
    assert refused(model=model, prices=OWN) == ("request_not_boundable", "model")


def test_anthropics_tools_that_the_client_runs_count_with_their_hidden_text():
    tools = [{"type": "bash_20250124", "name": "bash"}]
    request = asked(tools=tools)
    bound = bound_of(request, target("anthropic", "claude-sonnet-4-5"), AT)
    assert bound.input_tokens == len(request.body) + SLACK + 1_024
    assert refused(tools=tools) == ("request_not_boundable", "tools[0]")


@pytest.mark.parametrize(
    ("provider", "model", "tokens"),
    [
        ("openai", "gpt-4o", 1_445),
        ("openai", "gpt-4o-mini-2024-07-18", 48_169),
        ("openai", "gpt-4.1-nano", 3_779),
        ("openrouter", "openai/gpt-4o", 1_445),
        ("anthropic", "claude-sonnet-4-5", 4_784),
        ("gemini", "models/gemini-2.5-pro", 8_256),
        ("vllm", "Qwen/Qwen2.5-VL-7B-Instruct", 16_400),
    ],
)
def test_a_picture_elsewhere_counts_by_the_table(provider, model, tokens):
    request = asked(**part({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}))
    bound = bound_of(request, target(provider, model, OWN), AT)
    assert bound.input_tokens == len(request.body) + SLACK + tokens


def test_a_picture_in_the_body_counts_by_the_table_instead_of_its_bytes():
    request = asked(**part({"type": "image_url", "image_url": {"url": PNG}}))
    known = bound_of(request, target(), AT).input_tokens
    unknown = bound_of(request, target("custom", "gpt-4o", OWN), AT).input_tokens
    assert known == len(request.body) - len(PNG) + SLACK + 1_445
    assert unknown == len(request.body) + SLACK + 1_445


def test_pictures_in_a_tools_output_count_too():
    image = {"type": "input_image", "image_url": "https://example.com/a.png"}
    items = [{"type": "function_call_output", "call_id": "1", "output": [image, image]}]
    request = asked("responses", input=items)
    assert bound_of(request, target(), AT).input_tokens == len(request.body) + SLACK + 2 * 1_445


def test_sounds_and_texts_count_by_their_bytes():
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 900, "format": "wav"}}
    text = {"type": "file", "file": {"file_data": "data:text/plain;base64,QUFB"}}
    for content in (sound, text):
        request = asked(**part(content))
        assert bound_of(request, target(), AT).input_tokens == len(request.body) + SLACK


def test_a_pdf_counts_as_the_models_whole_window():
    request = asked(**part({"type": "file", "file": {"file_data": PDF, "filename": "a.pdf"}}))
    assert bound_of(request, target(), AT).input_tokens == len(request.body) + SLACK + 128_000
    for provider, model in (("openrouter", "openai/gpt-4o"), ("openai", "gpt-4o-mini"), ("custom", "x")):
        with pytest.raises(Forbidden, match="pages"):
            bound_of(request, target(provider, model, OWN), AT)


@pytest.mark.parametrize(
    "content",
    [
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_id": "file-1", "file_data": PDF}},
        {"type": "file", "file": {"file_data": "https://example.com/a.pdf"}},
        {"type": "file"},
        {"type": "input_file", "file_url": "https://example.com/a.pdf"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "image_url", "image_url": {"url": "data:application/pdf;base64,AAAA"}},
        {"type": "image_url", "image_url": None},
        {"type": "input_audio", "input_audio": {"data": "https://example.com/a.wav"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "document_url", "document_url": "https://example.com/a.pdf"},
        {"text": "?"},
        {"type": ["text"]},
    ],
)
def test_a_part_that_nobody_can_bound_is_refused_with_its_place(content):
    assert refused(**part(content)) == ("request_not_boundable", "messages[0].content")


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "msg_1"},
        {"id": "msg_1"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "image_generation_call", "id": "ig_1"},
        {"type": ["message"]},
    ],
)
def test_an_item_that_lies_at_the_host_is_refused(item):
    assert refused("responses", input=[item]) == ("request_not_boundable", "input[0]")


@pytest.mark.parametrize(
    "item",
    [
        {"role": "user", "content": "?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "AAAA"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "."}]},
    ],
)
def test_an_item_that_brings_all_its_text_is_bounded(item):
    assert bounded("responses", input=[item]).nano()


def test_an_answer_of_sound_by_its_id_is_refused():
    messages = [*TEXT, {"role": "assistant", "audio": {"id": "audio_1"}}]
    assert refused(messages=messages) == ("request_not_boundable", "messages[1].audio")


@pytest.mark.parametrize("texts", ["a", ["a", "b"], [1, 2, 3], [[1, 2], [3]]])
def test_texts_to_embed_are_bounded(texts):
    assert bounded("embeddings", model="text-embedding-3-small", input=texts).nano()


def test_what_else_is_embedded_is_not():
    pictures = [{"image": "https://example.com/a.png"}]
    assert refused("embeddings", prices=OWN, input=pictures) == ("request_not_boundable", "input[0]")


def test_a_prediction_may_be_billed_as_output_beside_the_answer():
    predicted = {"type": "content", "content": "x" * 1_000}
    bound = bounded(prediction=predicted, max_completion_tokens=10)
    assert bound.predicted_tokens > 1_000
    assert bound.nano() == bound.input_tokens * 2_500 + (10 + bound.predicted_tokens) * 10_000
    # OpenAI takes no maximum beside a prediction.
    without = bounded(model="gpt-4", prediction=predicted)
    assert (without.is_guess, without.output_tokens) == (False, 8_192)
    assert bounded(provider="custom", model="x", prices=OWN, prediction=predicted).is_guess
    assert bounded(provider="deepseek", model="deepseek-chat", prediction=predicted).predicted_tokens == 0


def test_the_dearest_target_says_what_is_held():
    request = asked(max_tokens=1_000)
    demand = demand_of(request, [target(), target(model="gpt-4o-mini")], AT, needs_price=True)
    dear, cheap = demand.bounds
    assert demand.kept == (0, 1)
    assert (demand.nano(), demand.least_nano()) == (dear.nano(), dear.nano(256))
    assert demand.tokens() == dear.tokens
    assert demand.limits(demand.nano()) == (None, None)
    assert demand.limits(dear.nano(600)) == (600, None)
    assert demand.limits(demand.least_nano()) == (256, None)
    assert cheap.nano() < dear.nano(256)


def test_a_guess_is_always_sent():
    demand = demand_of(asked(), [target(), target(model="gpt-4.1")], AT, needs_price=True)
    assert demand.limits(demand.nano()) == (16_384, 32_768)
    assert demand.limits(demand.least_nano()) == (
        256,
        max(256, demand.bounds[1].output_within(demand.least_nano())),
    )


def test_embeddings_have_no_limit_to_send():
    demand = demand_of(asked("embeddings"), [target(model="text-embedding-3-small")], AT, needs_price=True)
    assert demand.limits(demand.nano()) == (None,)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 40_000), st.integers(1, 4), st.floats(0, 1))
def test_every_targets_limit_fits_into_the_hold(most, n, share):
    targets = [target(), target(model="gpt-4.1"), target("anthropic", "claude-opus-4-1")]
    demand = demand_of(asked(max_tokens=most, n=n), targets, AT, needs_price=True)
    hold = demand.least_nano() + int(share * (demand.nano() - demand.least_nano()))
    for bound, limit in zip(demand.bounds, demand.limits(hold), strict=True):
        assert bound.nano(limit) <= hold
        assert bound.least_output_tokens <= (most if limit is None else limit) <= most


def test_later_targets_that_cannot_be_used_are_left_out():
    targets = [
        target(),
        target("custom", "x"),
        target(model="gpt-4o-search-preview"),
        target(model="gpt-4.1"),
    ]
    demand = demand_of(asked(), targets, AT, needs_price=True)
    assert demand.kept == (0, 3)
    assert len(demand.bounds) == len(demand.limits(demand.nano())) == 2
    with pytest.raises(Forbidden):
        demand_of(asked(), targets[1:], AT, needs_price=True)


def test_a_limit_of_tokens_alone_needs_no_price_and_no_bound():
    targets = [target("custom", "x"), target()]
    demand = demand_of(asked(max_tokens=9), targets, AT, needs_price=False)
    assert (demand.kept, demand.bounds[0].nano()) == ((0, 1), 0)
    request = asked(max_tokens=9, web_search_options={})
    demand = demand_of(request, targets, AT, needs_price=False)
    assert demand.tokens() == len(request.body) // 4 + 9


def test_a_refusal_says_what_to_do():
    with pytest.raises(Forbidden, match=r"'x' has no known price at custom .*`prices` of the provider key"):
        bounded(provider="custom", model="x")
    with pytest.raises(Forbidden, match=r"'plugins' may cost cannot be bounded .*no budget"):
        bounded(plugins=[{}])


def test_what_a_bound_looks_at_stands_only_once_in_a_body():
    assert boundable.NAMES <= DECISIVE
    looked_at = {"tools", "n", "best_of", "max_output_tokens", "prediction", "service_tier", "speed", "input"}
    assert looked_at <= DECISIVE


def test_a_bound_of_a_stored_price_is_exact():
    third = Decimal("0.333333333333333333")
    bound = Bound(Price(Rates(third, third, third, third), "override"), 3, 3, 1, False, 3)
    assert bound.nano() == 6 * 334
    assert cost(Usage(3, 3, 6), bound.price).nano == 2_000
