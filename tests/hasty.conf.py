"""The server's own configuration, with deadlines that a test can wait for."""

import os
from pathlib import Path

exec(compile(Path("gunicorn.conf.py").read_text(), "gunicorn.conf.py", "exec"))

from perpetuo import forms  # noqa: E402 - not before the first lines of the other have patched
from perpetuo.gateway import clients, upstream, walk  # noqa: E402

if "HASTY_SECONDS" in os.environ:
    clients.WRITE_SECONDS = walk.BODY_SECONDS = forms.BODY_SECONDS = float(os.environ["HASTY_SECONDS"])
if "KEEP_ALIVE_SECONDS" in os.environ:
    upstream.KEEP_ALIVE_SECONDS = float(os.environ["KEEP_ALIVE_SECONDS"])
