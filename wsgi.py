"""What gunicorn and the flask command load."""

from perpetuo import create_app

app = create_app()
