"""Runs the application as a process: its address, and its end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from dsa.serve.keys import Keys

MOST_CONNECTIONS = 1000


def check_address(host: str, keys: Keys) -> None:
    """Raises `ValueError` where others than this machine's users could reach a server without keys."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"host: {host} can be reached from other machines, and without a key everybody there could use the server; "
            "add --api-key-file FILE, or leave --host out"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `OSError` where the address is taken, or is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"port: cannot listen on {host} port {port}: {reason}; give another --port or --host") from error


def address_of(listening: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Any, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM, then lets running answers end; a second SIGINT does not wait for them.

    Args:
        app: Of `dsa.serve.create_app`.
        listening: Of `listen`.
        started: Called when requests are taken.

    Raises:
        KeyboardInterrupt: After SIGINT, when all has ended; what else handles a signal is called likewise.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=MOST_CONNECTIONS,
        http="h11",
        ws="none",
    )
    _Server(config, started).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, said: Callable[[], None]) -> None:
        super().__init__(config)
        self._said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._said()
