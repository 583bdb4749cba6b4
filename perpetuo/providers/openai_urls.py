"""Where the endpoints of a host are.

Azure's come in two shapes (learn.microsoft.com, "API version lifecycle", 2026): since August 2025
`…/openai/v1/chat/completions`, and before `…/openai/deployments/{deployment}/chat/completions?api-version=…`,
where the deployment is the model.
"""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit

from perpetuo.providers.base import Endpoint
from perpetuo.providers.hosts import Host

_PATHS: dict[Endpoint, str] = {
    "chat.completions": "/chat/completions",
    "embeddings": "/embeddings",
    "responses": "/responses",
}
_AZURE_API_VERSION = "2024-10-21"  # the last one that was not a preview, and the last dated one to be made


def endpoint_url(host: Host, base_url: str, endpoint: Endpoint, model: str) -> str:
    """The URL that a request for `model` goes to."""
    if host.urls == "azure":
        return _azure_url(base_url, _PATHS[endpoint], model, is_dated=endpoint != "responses")
    return _joined(base_url, _PATHS[endpoint])


def models_url(host: Host, base_url: str) -> str:
    """The URL of the list of models."""
    if host.urls == "azure":
        return _azure_url(base_url, "/models", None)
    return _joined(base_url, "/models")


def _joined(base_url: str, path: str) -> str:
    if "?" not in base_url:
        return base_url.rstrip("/") + path
    base, mark, query = base_url.partition("?")
    return base.rstrip("/") + path + mark + query


def _azure_url(base_url: str, path: str, model: str | None, *, is_dated: bool = True) -> str:
    parts = urlsplit(base_url)
    base, query = parts.path.rstrip("/"), parts.query
    root, slash, deployment = base.partition("/openai/deployments")
    if slash:
        query = query or f"api-version={_AZURE_API_VERSION}"
        if not is_dated:  # the Responses API is there in the newer shape only
            base, query = f"{root}/openai/v1", ""
        elif model is None:
            base = f"{root}/openai"
        elif not deployment:
            base += "/" + quote(model, safe="")
    elif base in ("", "/openai"):
        base = "/openai/v1"
    return urlunsplit((parts.scheme, parts.netloc, base + path, query, ""))
