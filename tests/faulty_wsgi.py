"""What gunicorn loads where a test wants bugs: the application, with a bug at each place that logs.

Each quotes what it has at hand, as careless code would: the prompt, the secret, the row.
"""

import sys
import threading
import warnings

import gevent

from perpetuo import create_app
from perpetuo.gateway import intake
from perpetuo.gateway.journey import Journey
from perpetuo.gateway.upstream import Upstream

check, send, settle = intake.check, Upstream.send, Journey.settle


def bug(*quoted):
    raise ValueError(f"cannot use {quoted}")


def check_with_bug(endpoint, body, fields, headers):
    return bug(body) if b"BUG EARLY" in body else check(endpoint, body, fields, headers)


def send_with_bug(upstream, call, target, request, attempts):
    if b"BUG LATE" in request.body:
        try:
            bug(request.body, request.headers)
        except ValueError as exc:
            raise KeyError(request.body) from exc
    return send(upstream, call, target, request, attempts)


def settle_with_poison(journey, status, usage, outcome, *, waits=True):
    if b"POISON" in journey.asked.body:
        outcome = {**outcome, "endpoint": None}  # no database takes this; PostgreSQL quotes the whole row
    settle(journey, status, usage, outcome, waits=waits)


def outside_flask(environ, start_response):
    if environ["PATH_INFO"] == "/escape":
        bug(environ["QUERY_STRING"])
    return inside_flask(environ, start_response)


app = create_app()
inside_flask, app.wsgi_app = app.wsgi_app, outside_flask
intake.check, Upstream.send, Journey.settle = check_with_bug, send_with_bug, settle_with_poison
warnings.warn("a warning\nof two lines", stacklevel=1)
print("printed past the log", file=sys.stderr)
threading.Thread(target=bug, args=(app.config["SECRET_KEY"],)).start()
gevent.get_hub().loop.run_callback(bug, app.config["SECRET_KEY"])
