"""What every request passes: its name, the `Host` header, the key, the size of its body, the answer's headers, the log.

Plain ASGI, so that streams pass through as they are.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsa.serve.errors import Refused, body
from dsa.serve.keys import Keys
from dsa.serve.logs import log_mistake, log_request
from dsa.serve.metrics import Metrics

OPEN_PATHS = ("/health",)
"""What needs no key."""

PAUSE_S = 30.0
"""Seconds between two parts of a body at most."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Rules:
    """What is let in.

    Args:
        keys: Those of the clients.
        hosts: Names that a `Host` header may have next to `localhost` and addresses in numbers.
        most_body: Bytes of a body.
    """

    keys: Keys
    hosts: Sequence[str] = ()
    most_body: int = 64 << 20


class Door:
    """See the module. Handlers find `owner`, `client`, `request_id` in `request.state`."""

    def __init__(self, app: Any, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = name
        passage = _Passage(send, name)
        began = time.monotonic()
        try:
            state["owner"] = self._owner(scope, headers)
            state["client"] = state["owner"] or (scope.get("client") or ("", 0))[0]
            await self.app(scope, self._bounded(headers, receive), passage.send)
        except Refused as error:
            await passage.refuse(error)
        except Exception as error:
            log_mistake(error)
            await passage.refuse(Refused("the server made a mistake; its log says where", status=500))
        finally:
            # Which of our paths it was, not what a client wrote there.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            seconds = time.monotonic() - began
            self.metrics.finished(path, passage.status, seconds)
            log_request(name, scope["method"], path, passage.status, seconds, state.get("tokens"))

    def _owner(self, scope: Any, headers: dict[str, str]) -> str:
        """Raises `Refused` for a host that is not ours, for what no path takes, and for a wrong key."""
        if not _is_known_host(headers.get("host", ""), self.rules.hosts):
            raise Refused(
                "Host: this server is not called so; use its address, or start it with --allow-host NAME", status=421
            )
        if scope["query_string"]:
            raise Refused("query: this server takes no parameters after `?`; leave them out")
        if scope["path"] in OPEN_PATHS:
            return ""
        owner = self.rules.keys.owner(headers.get("authorization"))
        if owner is None:
            raise Refused(
                "Authorization: expected `Bearer KEY` with a key of this server",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return owner

    def _bounded(self, headers: dict[str, str], receive: Any) -> Any:
        """`receive` that refuses what is too large or too slow. Raises `Refused`."""
        most = self.rules.most_body
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            raise _too_large(most)
        held = 0
        is_read = False

        async def bounded() -> Any:
            nonlocal held, is_read
            if is_read:
                return await receive()
            try:
                async with asyncio.timeout(PAUSE_S):
                    message = await receive()
            except TimeoutError:
                raise Refused("the body comes too slowly", status=408) from None
            held += len(message.get("body", b""))
            is_read = not message.get("more_body", False)
            if held > most:
                raise _too_large(most)
            return message

        return bounded


class _Passage:
    """Sends an answer with our headers, and remembers its status."""

    def __init__(self, send: Any, name: str) -> None:
        self._send, self._name = send, name
        self.status = 0

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            own = {name for name, _ in headers}
            headers += [each for each in HEADERS if each[0] not in own]
            headers.append((b"x-request-id", self._name.encode()))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: Refused) -> None:
        if self.status:
            return
        content = json.dumps(body(error)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
        pairs = [(name.encode(), value.encode()) for name, value in {**headers, **(error.headers or {})}.items()]
        await self.send({"type": "http.response.start", "status": error.status_code, "headers": pairs})
        await self._send({"type": "http.response.body", "body": content})


def _too_large(most: int) -> Refused:
    return Refused(f"the body is larger than {most >> 20:,} MB, which is the most that is taken", status=413)


def _is_known_host(host: str, names: Sequence[str]) -> bool:
    """Whether a `Host` header names this server.

    A page that has its own name point here (DNS rebinding) sends that name. Addresses in numbers cannot be made to.
    """
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    if name in ("localhost", *(each.lower() for each in names)):
        return True
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False
