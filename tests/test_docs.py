import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perpetuo import config
from tests.fake_upstream import FakeUpstream
from tests.serving import Serving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def settings_in_code():
    return set(re.findall(r'read\.\w+\(\s*"([A-Z_]+)"', Path(config.__file__).read_text())) | {
        "ENCRYPTION_KEYS"
    }


def blocks(kind):
    return re.findall(rf"<!-- readme: {kind} -->\n```\w+\n(.*?)```", README, re.DOTALL)


def test_the_readme_names_every_setting_and_no_other():
    table = README.partition("## Settings")[2].partition("## Deploying")[0]
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE)) == settings_in_code()


def test_the_example_explains_every_setting_and_no_other():
    named = re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert set(named) == settings_in_code()
    assert len(named) == len(set(named))


def test_the_readme_gives_the_defaults_that_the_code_has(tmp_path):
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| `([^`]*)`", README, re.MULTILINE))
    (tmp_path / "empty").touch()
    settings = config.load({"PERPETUO_DATA": str(tmp_path)})
    for name in (
        "MAX_BODY_BYTES",
        "MAX_IN_FLIGHT",
        "IDLE_TIMEOUT",
        "TOTAL_TIMEOUT",
        "DRAIN_TIMEOUT",
        "SIGNUP",
    ):
        assert str(getattr(settings, name.lower())).removesuffix(".0") == table[f"PERPETUO_{name}"]


def test_the_readme_names_every_command_and_no_other(app):
    table = README.partition("| command (`flask")[2].partition("## Development")[0]
    named = {name.split()[0] for name in re.findall(r"`([a-z ]+)[A-Z]*`", table)}
    ours = {
        name for name, command in app.cli.commands.items() if command.callback.__module__ == "perpetuo.cli"
    }
    assert named | {"secrets"} == ours


@pytest.fixture
def running(database_url, tmp_path):
    with FakeUpstream() as upstream, Serving(database_url, tmp_path) as server:
        yield {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GATEWAY": server.url,
            "UPSTREAM": upstream.base_url,
            "UPSTREAM_KEY": "sk-test",
        }


def test_the_readme_works_as_printed(running, tmp_path):
    (inputs,) = blocks("inputs")
    assert set(re.findall(r"export (\w+)=", inputs)) == {"GATEWAY", "UPSTREAM", "UPSTREAM_KEY"}
    (tmp_path / "readme.py").write_text(blocks("python")[0])
    script = "set -eu\n" + "\n".join(blocks("curl")) + f"\necho\npython3 -W error {tmp_path}/readme.py\n"
    ran = subprocess.run(["bash", "-c", script], env=running, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert '"object":"chat.completion"' in ran.stdout
    assert "data: [DONE]" in ran.stdout
    assert '"status":"ok"' in ran.stdout.replace('": ', '":')
    assert '"requests":2' in ran.stdout.replace('": ', '":')
    assert ran.stdout.endswith("Hello world\nHello world")
