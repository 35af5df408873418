"""Who may use the server, and whose is what was read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from dsa.text import read_text

SHORTEST = 16
"""Characters of a key. What is kept carries a hash of it, so it must not be one that can be guessed."""


class Keys:
    """The keys that are known; without any, everybody who reaches the server may use it."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Raises `ValueError` for a key that is too short."""
        for key in keys:
            if len(key) < SHORTEST or not key.isascii() or any(character.isspace() for character in key):
                raise ValueError(
                    f"api-key-file: expected keys of at least {SHORTEST} ASCII characters without spaces, one a line, "
                    f"got one of {len(key)}; make one with `openssl rand -hex 24`"
                )
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str | None:
        """Whose a request is, by its `Authorization` header: `""` where no keys are, `None` for a wrong or no key.

        Takes equally long whichever key it is.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return hashlib.sha256(b"owner" + given).hexdigest()[:24] if any(matches) else None


def read_keys(file: Path) -> Keys:
    """The keys of a file, one a line; empty lines and those that begin with `#` do not count.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: There is no key in it, or one that is too short.
    """
    lines = [line.strip() for line in read_text(file, "api-key-file").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api-key-file: {file} holds no key; write one a line, such as `openssl rand -hex 24` makes")
    return Keys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
