"""The official npm client in a node process of its own, driven line by line through npm/client.mjs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.absent import must_have

FOLDER = Path(__file__).parent / "npm"


class NpmError(Exception):
    """What the client threw: `kind` is the name of its class, the rest are its own fields or None."""

    def __init__(self, thrown: Mapping[str, Any]) -> None:
        super().__init__(thrown["message"])
        self.kind: str = thrown["kind"]
        self.is_api_error: bool = thrown["is_api_error"]
        self.status: int | None = thrown.get("status")
        self.code: Any = thrown.get("code")
        self.type: Any = thrown.get("type")
        self.param: Any = thrown.get("param")
        self.request_id: str | None = thrown.get("request_id")


def is_installed() -> bool:
    """Whether the client is there in the version that package.json names."""
    found = FOLDER / "node_modules" / "openai" / "package.json"
    pinned = json.loads((FOLDER / "package.json").read_text())["dependencies"]["openai"]
    return found.exists() and json.loads(found.read_text())["version"] == pinned


class NodeProcess:
    """One node for many calls, one call at a time. `start` may be followed by `abort`, then `result`."""

    def __init__(self) -> None:
        must_have("npm", shutil.which("node"), "node is not on this machine")
        must_have("npm", is_installed(), f"`npm ci` has not run in {FOLDER}, or failed")
        self.process = subprocess.Popen(
            ["node", "client.mjs"], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()

    def start(self, client: Mapping[str, Any], scenario: str, params: Mapping, options: Mapping) -> None:
        self._write({"client": client, "scenario": scenario, "params": params, "options": options})

    def abort(self) -> None:
        self._write({"abort": True})

    def result(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"node ended with {self.process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            raise NpmError(answer["error"])
        return answer.get("value")

    def _write(self, command: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()


class NpmClient:
    """The client of one API key. `settings` are the client's own options, in its own names."""

    def __init__(self, node: NodeProcess, settings: Mapping[str, Any]) -> None:
        self.node = node
        self.settings = settings

    def with_options(self, **settings: Any) -> NpmClient:
        return NpmClient(self.node, {**self.settings, **settings})

    def start(self, scenario: str, *, options: Mapping[str, Any] | None = None, **params: Any) -> None:
        self.node.start(self.settings, scenario, params, options or {})

    def call(self, scenario: str, *, options: Mapping[str, Any] | None = None, **params: Any) -> Any:
        """What the scenario gives. Raises NpmError where the client threw."""
        self.start(scenario, options=options, **params)
        return self.node.result()
