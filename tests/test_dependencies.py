import json
import re
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Below these the release notes and advisories name a hole that concerns us.
FLOORS = {"gunicorn": "26.1", "Flask": "3.1.3", "Werkzeug": "3.1.6", "requests": "2.33", "urllib3": "2.7.0"}
KNOWN_HOOKS = {"distutils-precedence.pth"}  # setuptools', which older venvs bring along


def asked_for():
    lines = (ROOT / "requirements.in").read_text().splitlines()
    return [line for line in lines if line and line[0] not in "#-"]


def pinned(name):
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)]


def test_at_most_fifteen_direct_dependencies_each_pinned():
    assert len(asked_for()) <= 15
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line) for line in asked_for())


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_all_that_is_installed_is_pinned_by_hash(name):
    text = (ROOT / name).read_text()
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert all("--hash=sha256:" in block for block in blocks)
    asked = {re.split(r"[\[=]", line)[0].lower().replace("_", "-") for line in asked_for()}
    assert asked <= {package.lower() for package in pinned(name)}


def test_npm_packages_are_pinned_by_hash_and_come_from_the_registry_that_is_set():
    folder = ROOT / "tests" / "clients" / "npm"
    asked = json.loads((folder / "package.json").read_text())["dependencies"]
    lock = json.loads((folder / "package-lock.json").read_text())["packages"]
    installed = {name: each for name, each in lock.items() if name}
    assert {name: installed[f"node_modules/{name}"]["version"] for name in asked} == asked
    assert all(each["integrity"].startswith("sha512-") for each in installed.values())
    assert not any("resolved" in each for each in installed.values())


def test_development_runs_what_production_runs():
    everything = pinned("requirements-dev.txt")
    assert {package: everything.get(package) for package in pinned("requirements.txt")} == pinned(
        "requirements.txt"
    )


@pytest.mark.parametrize("package", FLOORS)
def test_no_release_with_a_known_hole(package):
    assert numbers(version(package)) >= numbers(FLOORS[package])


def test_no_package_runs_at_every_start_of_python():
    hooks = {path.name for path in Path(sysconfig.get_path("purelib")).glob("*.pth")}
    assert hooks <= KNOWN_HOOKS
