"""PERPETUO: a self-hosted gateway for language models whose books are honest."""

from __future__ import annotations

from flask import Flask

from perpetuo import (
    api_keys,  # noqa: F401 - its views belong to the blueprint of workspaces
    auth,
    cli,
    logs,
    metrics,  # noqa: F401 - its view belongs to the blueprint of web
    models,  # noqa: F401 - the tables register themselves
    provider_keys,  # noqa: F401 - like api_keys
    web,
    workspaces,
)
from perpetuo import config as settings_file
from perpetuo.config import Settings
from perpetuo.db import db
from perpetuo.gateway import routes
from perpetuo.gateway.walk import Gateway
from perpetuo.native import is_patched


def create_app(config: Settings | None = None) -> Flask:
    """The application, assembled. It opens no connection: gunicorn.conf.py runs the checks at start."""
    settings = config or settings_file.load()
    app = Flask(__name__)
    app.extensions["perpetuo"] = Gateway(settings)
    app.config.update(
        SECRET_KEY=settings.secret_keys[0],
        SECRET_KEY_FALLBACKS=list(settings.secret_keys[1:]),
        SQLALCHEMY_DATABASE_URI=settings.database_url,
    )
    db.init_app(app)
    if not is_patched():  # the server migrates nothing, and Alembic would cost each process 12 MiB
        from flask_migrate import Migrate

        Migrate(app, db, directory=str(settings_file.ROOT / "migrations"))
    web.init_app(app)
    cli.init_app(app)
    for blueprint in (routes.blueprint, auth.blueprint, workspaces.blueprint, logs.blueprint):
        app.register_blueprint(blueprint)
    return app
