"""What only some runs need: imported when it is asked for, with the command that installs it."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install 'dsa-attention[train]'"


def needed(module: str, purpose: str) -> Any:
    """A module of the extra `train`.

    Args:
        module: Its name.
        purpose: What it is needed for, as the beginning of a sentence.

    Raises:
        ImportError: It is not installed; the message says what installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs the package {package}: {INSTALL} ({error})") from error
