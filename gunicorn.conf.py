"""Every setting of the server, each with its reason. The first lines patch: nothing may import ssl before."""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from perpetuo import checks  # noqa: E402
from perpetuo.config import SettingsError, load  # noqa: E402

try:
    settings = load()
except SettingsError as error:
    sys.exit(str(error))

# A greenlet and two sockets for each of a thousand streams.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.web_concurrency
worker_class = "gevent"
worker_connections = 10_000  # beyond it accept stops; we answer 503 long before
backlog = 2048
keepalive = 5  # also the total time in which a request's headers must arrive
timeout = 60  # a worker whose loop stands still this long is replaced; no limit on requests
graceful_timeout = int(settings.drain_timeout) + keepalive + 5  # above the drain, which settles every row
max_requests = 0  # recycling a worker cuts its streams
control_socket_disable = True  # on by default since gunicorn 25.1; it can stop and reload the server
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a heartbeat must not wait for a disk
accesslog = None  # the log rows are the access log
errorlog = "-"
loglevel = "info"
proc_name = "perpetuo"


def on_starting(server):
    """What must be true before anybody is served. A database that is down at start is no fault."""
    server.handle_int = server.handle_term  # Ctrl-C drains too, as SIGTERM does
    faults = checks.at_start(settings)
    if faults:
        print("PERPETUO cannot start:\n" + "\n".join(f"  - {fault}" for fault in faults), file=sys.stderr)
        sys.exit(1)


def when_ready(server):
    server.log.info("PERPETUO serves at %s", settings.public_url)


def post_worker_init(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the master decides
    worker.wsgi.extensions["perpetuo"].start(lambda: worker.alive)


def worker_exit(server, worker):
    """Commits what waits and lets go of the process's lock, which says that it lives."""
    app = getattr(worker, "wsgi", None)
    if app is not None and worker.pid == os.getpid():
        app.extensions["perpetuo"].close()
