"""The error tree, and the one JSON shape in which every error leaves this program.

    GatewayError                     carries status, type, code, param, headers
    ├── InvalidRequest          400  what was sent cannot be used; may carry `details`
    ├── NotFound                404  no such thing, or not yours: the two look the same
    ├── Unauthenticated         401
    ├── Forbidden               403
    ├── RateLimited             429
    ├── Unavailable             503  the gateway itself cannot serve now; has `retry-after`
    └── UpstreamError           502  what an upstream did, in our words or in its own

Knows no Flask and no HTTP library: a view or the walk turns an instance into an answer.
"""

from __future__ import annotations

from typing import Any


class GatewayError(Exception):
    """An error with everything that its answer needs.

    `status` is the HTTP status, `type` and `code` are the words of the contract, `param` names the
    field at fault, `headers` go out with the answer, `details` lists all problems of a validation.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        details: list[dict[str, str | None]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = param
        self.headers = headers or {}
        self.details = details

    def body(self) -> dict[str, Any]:
        """The one JSON shape: `{"error": {"message", "type", "param", "code"[, "details"]}}`."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.details is not None:
            error["details"] = self.details
        return {"error": error}


class InvalidRequest(GatewayError):
    status = 400
    type = "invalid_request_error"


class NotFound(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Unauthenticated(GatewayError):
    status = 401
    type = "authentication_error"
    code = "unauthorized"


class Forbidden(GatewayError):
    status = 403
    type = "permission_error"


class RateLimited(GatewayError):
    status = 429
    type = "rate_limit_error"


class Unavailable(GatewayError):
    """The gateway cannot serve now. `retry_after` is in whole seconds."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, code: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, code=code, headers={"retry-after": str(retry_after)})


class UpstreamError(GatewayError):
    """An attempt failed at the upstream.

    `upstream_status` is what the upstream answered, None where it did not. A final 5xx forbids the
    client's own retries, so that they do not multiply ours (`clients.md` 94 and 95).
    """

    status = 502
    type = "upstream_error"
    code: str | None = "upstream_error"

    def __init__(self, message: str, *, upstream_status: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.upstream_status = upstream_status
        if self.status >= 500 and "retry-after" not in self.headers:
            self.headers["x-should-retry"] = "false"
