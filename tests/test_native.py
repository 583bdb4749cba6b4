"""What would stop the event loop runs beside it: each of it, made to take long, in a process on gevent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 0.8  # that each of them takes here
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

SCRIPT = """
from gevent import monkey
monkey.patch_all()
import json, sys, time
from contextlib import suppress
from perpetuo import accounts, crypto
from perpetuo.config import load
from perpetuo.errors import NotFound
from perpetuo.gateway import bodies
from perpetuo.gateway.walk import Gateway
from perpetuo.pulse import Pulse

def hold(*_):
    monkey.get_original("time", "sleep")(float(sys.argv[3]))
    return b""

gateway = Gateway(load({"DATABASE_URL": sys.argv[1], "PERPETUO_DATA": sys.argv[2]}))
database = gateway.database
crypto.is_password = crypto.hash_password = bodies.pack = hold
suspects = {
    "a password checked": lambda: accounts.is_password(database, None, "secret"),
    "a password hashed": lambda: accounts.change_user(database, "nobody", password="secret"),
    "a body packed": lambda: bodies.pack_beside(database.native, b"x" * (bodies.LONG + 1)),
    "many rows read": lambda: database.read_many(hold),
    "a transaction": lambda: database.transaction(hold),
    "a short read": lambda: database.read(hold),
}
pauses = {}
for name, suspect in suspects.items():
    pulse = Pulse()
    pulse.start()
    time.sleep(0.05)
    with suppress(NotFound):
        suspect()
    time.sleep(0.05)
    pulse.close()
    pauses[name] = pulse.longest
gateway.close()
print(json.dumps(pauses))
"""


@on_sqlite
def test_what_takes_long_runs_beside_the_loop(database_url: str, tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, database_url, str(tmp_path), str(SECONDS)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    pauses = json.loads(ran.stdout)
    assert pauses.pop("a short read") > SECONDS / 2  # in the loop itself: it is seen
    assert not {name: seconds for name, seconds in pauses.items() if seconds > SECONDS / 2}
