"""The server's log: a line a request, without any text of it."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

logger = logging.getLogger("dsa.serve")


class Lines(logging.Formatter):
    """`12:00:00 message`, and the fields of a request as `name=value`; or all of it as JSON."""

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        fields = getattr(record, "fields", {})
        message = record.getMessage()
        if self._is_json:
            plain = {"time": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
            return json.dumps({**plain, "message": message, **fields})
        said = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{at.astimezone():%H:%M:%S} {message} {said}".rstrip()


def log_mistake(error: Exception) -> None:
    """An error of ours: its type and the places in the code, and no text of a request."""
    logger.error("a request failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


def log_to_stderr(log_format: str) -> None:
    """Has everything that the library and uvicorn say go to stderr, as `"text"` or `"json"`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(is_json=log_format == "json"))
    for name, level in (("dsa", logging.INFO), ("uvicorn", logging.WARNING)):
        each = logging.getLogger(name)
        each.handlers, each.propagate = [handler], False
        each.setLevel(level)


def log_request(
    name: str, method: str, path: str, status: int, seconds: float, tokens: dict[str, int] | None = None
) -> None:
    """One request that has ended.

    Args:
        name: Its id.
        method: Of HTTP.
        path: Ours, not what the client wrote.
        status: Of HTTP; 0 where the client went before there was one.
        seconds: How long it took.
        tokens: What was read, held and written.
    """
    fields = {"id": name, "method": method, "path": path, "status": status, "ms": round(1000 * seconds)}
    logger.info("request", extra={"fields": {**fields, **(tokens or {})}})
