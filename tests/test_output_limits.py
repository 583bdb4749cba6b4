import pytest

from perpetuo.output_limits import FALLBACK, LIMITS, most_output_tokens, output_bound


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        ("gpt-4o-mini-2024-07-18", 16_384),
        ("openai/gpt-4o", 16_384),
        ("gpt-4o-2024-05-13", 4_096),
        ("gpt-4", 8_192),
        ("gpt-4-0613", 8_192),
        ("gpt-4-turbo-2024-04-09", 4_096),
        ("gpt-4-1106-preview", 4_096),
        ("gpt-4.1-mini", 32_768),
        ("gpt-5.2-chat-latest", 16_384),
        ("gpt-5-mini", 128_000),
        ("o1-mini", 65_536),
        ("o3-pro", 100_000),
        ("claude-3-5-sonnet-20241022", 8_192),
        ("anthropic/claude-opus-4.1", 32_000),
        ("claude-opus-4-20250514", 32_000),
        ("claude-opus-4-5-20251101", 64_000),
        ("models/gemini-2.5-pro", 65_535),
        ("deepseek-chat", 8_192),
        ("GPT-4O", 16_384),
    ],
)
def test_a_known_model_has_its_makers_limit(model, limit):
    assert most_output_tokens(model) == output_bound(model) == limit


@pytest.mark.parametrize("model", ["", "llama-3.3-70b-versatile", "a/b/c", "gpt-4o" * 1000, "gpt-40"])
def test_an_unknown_model_gets_the_fallback(model):
    expected = LIMITS["gpt-4o*"] if model.startswith("gpt-4o") else None
    assert most_output_tokens(model) == expected
    assert output_bound(model) == (expected or FALLBACK)


def test_no_limit_is_hidden_by_one_before_it():
    reached = {next(glob for glob in LIMITS if glob_matches(glob, name)) for name in map(example, LIMITS)}
    assert reached == set(LIMITS)


def example(glob):
    return glob.replace("*", "-x")


def glob_matches(glob, name):
    from fnmatch import fnmatchcase

    return fnmatchcase(name, glob)
