"""What gunicorn and the flask command load."""

from perpetuo import cli, create_app
from perpetuo.config import SettingsError

try:
    app = create_app()
except SettingsError as error:
    app = cli.app_without_settings(error)
