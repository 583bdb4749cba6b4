"""What gunicorn and the flask command load."""

import sys

from perpetuo import cli, create_app
from perpetuo.config import SettingsError

try:
    app = cli.app_for_secrets() if sys.argv[-1:] == ["secrets"] else create_app()
except SettingsError as error:
    sys.exit(str(error))
