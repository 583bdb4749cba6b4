import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "perpetuo"
FLOORS = [
    {
        "config",
        "addresses",
        "made_secrets",
        "errors",
        "log_lines",
        "crypto",
        "schemas",
        "fields",
        "periods",
        "throttle",
        "wire",
    },
    {"providers", "pricing", "price_list", "output_limits"},
    {"columns", "db", "db_errors", "engines", "native", "pulse", "liveness", "models"},
    {"gateway", "accounts", "listing", "reports", "usage"},
    {"web", "forms", "metrics", "guard", "gateway.routes", "auth", "workspaces", "api_keys"}
    | {"provider_keys", "logs"},
    {"", "cli", "checks", "worker"},
]
BLUEPRINTS = {"gateway.routes": 1, "auth": 2, "logs": 3, "workspaces": 4, "api_keys": 4, "provider_keys": 4}
FENCES = {
    "requests": set(),
    "urllib3": {"gateway.network"},
    "cryptography": {"crypto"},
    "gevent": {"gateway.calls", "gateway.clients", "engines", "native", "pulse"},
    "perpetuo.db.db": {""},
}
FLASK = {"flask", "flask_login", "flask_migrate", "flask_sqlalchemy", "werkzeug"}
IMPURE = {"sqlalchemy", "socket", "ssl", "http", "threading", "gevent", "os", "subprocess"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip("."): path
    for path in ROOT.rglob("*.py")
}


def imports(path):
    """Every name imported anywhere in a file, those of our own packages down to the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path):
    """The modules of ours that a file imports."""
    names = [name.removeprefix("perpetuo.") for name in imports(path) if name.startswith("perpetuo.")]
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


def floor(module):
    """A module stands on the floor that names it, else on that of its package."""
    package = module.partition(".")[0]
    found = [n for n, rooms in enumerate(FLOORS) if module in rooms] or [
        n for n, rooms in enumerate(FLOORS) if package in rooms
    ]
    assert found, f"{module} stands on no floor"
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_downwards_only(module):
    above = {name for name in own(MODULES[module]) if floor(name) > floor(module)}
    assert not above, f"{module} looks up to {above}"
    if floor(module) == 1:
        assert all(floor(name) != 2 for name in own(MODULES[module]))


@pytest.mark.parametrize("module", BLUEPRINTS)
def test_a_blueprint_knows_no_other(module):
    others = {
        name for name in own(MODULES[module]) & BLUEPRINTS.keys() if BLUEPRINTS[name] != BLUEPRINTS[module]
    }
    assert not others


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_used_behind_its_fence_only(module):
    names = set(imports(MODULES[module]))
    packages = {name.partition(".")[0] for name in names}
    for fenced, rooms in FENCES.items():
        assert fenced not in names | packages or module in rooms, f"{module} imports {fenced}"
    assert not packages & FLASK or floor(module) >= 4 or module == "db"
    assert not packages & IMPURE or floor(module) != 1


def test_nothing_imports_in_a_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {[*path, module]}"
        if module not in done:
            path.append(module)
            for name in own(MODULES[module]):
                visit(name)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


def test_every_floor_is_there():
    assert sys.version_info >= (3, 11)
    rooms = {floor(module) for module in MODULES}
    assert rooms == set(range(6))
