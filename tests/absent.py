"""What the machine lacks fails the tests that want it, unless PERPETUO_TEST_WITHOUT names it."""

from __future__ import annotations

import os

import pytest


def must_have(name: str, is_there: object, why: str) -> None:
    """Fails, or skips where PERPETUO_TEST_WITHOUT (comma-separated) says that `name` may be missing."""
    if is_there:
        return
    if name in os.environ.get("PERPETUO_TEST_WITHOUT", "").split(","):
        pytest.skip(f"without {name}: {why}")
    pytest.fail(f"{why}; `make test` brings it, or PERPETUO_TEST_WITHOUT={name} goes without", pytrace=False)
