"""Every setting of the server, each with its reason. The first lines patch: nothing may import ssl before."""

from gevent import monkey

monkey.patch_all()

import gc  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from gevent.hub import Hub  # noqa: E402
from gunicorn import glogging  # noqa: E402

from perpetuo import checks, log_lines, price_list  # noqa: E402
from perpetuo.config import SettingsError, load  # noqa: E402

price_list.load()  # before the fork: the workers share it, and no request waits for it
log_lines.configure()
log = logging.getLogger("perpetuo")
try:
    settings = load()
except SettingsError as error:
    log.critical("%s", error)
    sys.exit(1)

# A greenlet and two sockets for each of a thousand streams.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.web_concurrency
worker_class = "perpetuo.worker.Worker"  # gevent's, with deadlines for writing to a client
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


class Lines(glogging.Logger):
    """gunicorn's log in our lines. Not by `logconfig_dict`, which would turn its access log on."""

    def setup(self, cfg):
        super().setup(cfg)
        log_lines.configure()


logger_class = Lines
Hub.print_exception = lambda hub, context, kind, error, trace: log_lines.failed("a greenlet failed", error)


def on_starting(server):
    """What must be true before anybody is served. A database that is down at start is no fault."""
    server.handle_int = server.handle_term  # Ctrl-C drains too, as SIGTERM does
    faults = checks.at_start(settings)
    if faults:
        log.critical("PERPETUO cannot start:\n%s", "\n".join(f"  - {fault}" for fault in faults))
        sys.exit(1)


def when_ready(server):
    # What the workers share stays shared: a collection in one of them would write into all of it.
    gc.collect()
    gc.freeze()
    log.info("PERPETUO serves at %s", settings.public_url)


def post_worker_init(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the master decides
    # A full collection would look at all that was imported, for 60 ms in which nothing else runs.
    gc.collect()
    gc.freeze()
    # Fewer looks for cycles, of which a request leaves none: at a thousand streams they are 5 ms of the p99.
    gc.set_threshold(20_000, 20, 20)
    # How long a native thread may keep Python's lock where the loop wants it back, which it does after each
    # write to a socket. With the default of 5 ms the commits' own thread costs a third of the calls a second.
    sys.setswitchinterval(0.001)
    worker.wsgi.extensions["perpetuo"].start(lambda: worker.alive)


def worker_exit(server, worker):
    """Commits what waits and lets go of the process's lock, which says that it lives."""
    app = getattr(worker, "wsgi", None)
    if app is not None and worker.pid == os.getpid():
        app.extensions["perpetuo"].close()


def post_request(worker, req, environ, resp):
    """What is logged next on this connection belongs to another request."""
    log_lines.request_id.set(None)
