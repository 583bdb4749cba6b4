"""The server's worker: gunicorn's for gevent, with deadlines for the clients that it is talking to."""

from __future__ import annotations

from typing import Any

from gunicorn.workers.ggevent import GeventWorker

from perpetuo.gateway.clients import Client


class Worker(GeventWorker):
    """Its header deadline is gunicorn's (`keepalive`); bodies have theirs where they are read."""

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """One connection, from its first request to its last."""
        client.__class__ = Client  # a new socket on the same descriptor would cost 20 µs
        super().handle(listener, client, addr)
