"""Errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
}
"""OpenAI's `type` by status; others are `server_error`."""


class Refused(HTTPException):
    """A request that is not served, and why."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            message: One sentence for the client.
            param: The field of the request that it is about.
            status: Of HTTP.
            code: OpenAI's, where there is one.
            headers: Of the answer.
        """
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code


def body(error: Refused) -> dict[str, Any]:
    """An error as JSON."""
    kind = KINDS.get(error.status_code, "server_error")
    return {"error": {"message": error.detail, "type": kind, "param": error.param, "code": error.code}}
