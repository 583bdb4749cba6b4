"""The server's log on stderr: one JSON object a line, or lines for people where stderr is a terminal.

No secret and no prompt may get there. So the message of an exception is told only where it cannot quote what
a client, an upstream or a row holds, and of gunicorn's own messages only what it says itself.
"""

from __future__ import annotations

import io
import json
import logging
import logging.config
import re
import sys
import threading
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from perpetuo.config import SettingsError
from perpetuo.errors import Unavailable

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # greenlet-local under gevent

FRAMES = 40  # of a traceback, the last ones
OURS = (SettingsError, Unavailable)  # our own fixed sentences
# These speak of types and names, of files and sockets; a ValueError or KeyError quotes its value.
PLAIN = (
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    IndexError,
    ArithmeticError,
    RuntimeError,
    OSError,
)
PLAIN_MODULES = ("builtins", "socket", "ssl")
# gunicorn quotes the bytes that it could not read, which may be a body or a key, and whole URLs.
QUOTED = (
    (re.compile(r"(Invalid request from ip=\S*: [A-Za-z ]*).*", re.DOTALL), r"\1"),
    (re.compile(r"(Error handling request [^?]*)\?.*", re.DOTALL), r"\1"),
)


class Lines(logging.Formatter):
    """A record as one JSON object, or for people."""

    def __init__(self, *, for_people: bool) -> None:
        super().__init__()
        self.for_people = for_people

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _said(record),
            "process": record.process,
            "request_id": getattr(record, "request_id", None) or request_id.get(),
            "error": trace(record.exc_info[1]) if record.exc_info and record.exc_info[1] else None,
        }
        if not self.for_people:
            return json.dumps({name: value for name, value in line.items() if value is not None})
        head = " ".join(str(line[name]) for name in ("time", "level", "process", "message"))
        tail = f" ({line['request_id']})" if line["request_id"] else ""
        return "\n".join(filter(None, (head + tail, line["error"])))


def _said(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name.startswith("gunicorn"):
        for quoted, kept in QUOTED:
            message = quoted.sub(kept, message)
    return message


def trace(error: BaseException) -> str:
    """A traceback with its causes, first the first, in which only harmless messages are told."""
    told: list[str] = []
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        frames = "".join(traceback.format_tb(here.__traceback__, -FRAMES))
        told.append(f"{frames}{type(here).__module__}.{type(here).__qualname__}: {_message(here)}")
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)
    return "\nwhich led to\n".join(reversed(told))


def _message(error: BaseException) -> str:
    module, name = type(error).__module__, type(error).__name__
    if isinstance(error, OURS) or (isinstance(error, PLAIN) and module in PLAIN_MODULES):
        return str(error)
    state = getattr(error, "pgcode", None)
    if state is not None:
        return f"SQLSTATE {state}"  # what PostgreSQL says besides may quote a row, or the statement
    if module == "sqlite3" or (module, name) == ("psycopg2", "OperationalError"):
        return str(error).strip()  # of columns and of files; of the connection
    return "(not told: it may quote what was sent)"


class _Strays(io.TextIOBase):
    """Takes sys.stderr's place for what is printed past the log: each print becomes a line of it."""

    def write(self, text: str) -> int:
        if text.strip():
            logging.getLogger("stderr").warning("%s", text.rstrip())
        return len(text)


def configure() -> None:
    """Everything that this process logs, warns of or dies of becomes lines on stderr. May run twice."""
    assert sys.__stderr__ is not None
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(Lines(for_people=sys.__stderr__.isatty()))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("gunicorn.error", "perpetuo"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a log that cannot be written must not be written about
    sys.excepthook = lambda kind, error, _: failed("the process failed", error)
    sys.unraisablehook = lambda told: failed(f"ignored in {_name(told.object)}", told.exc_value)
    threading.excepthook = lambda told: failed("a thread failed", told.exc_value)
    sys.stderr = _Strays()


def failed(what: str, error: BaseException | None) -> None:
    """Logs an exception that nobody caught."""
    logging.getLogger(__name__).critical(what, exc_info=error)


def _name(thing: object) -> str:
    return getattr(thing, "__qualname__", type(thing).__qualname__)
