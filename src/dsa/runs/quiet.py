"""What libraries and our own warnings say by themselves, silenced for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_dsa() -> Iterator[None]:
    """Silences our own warnings; errors still come through."""
    logger = logging.getLogger("dsa")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and hints of transformers and of the Hub's client; errors still come through."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    levels = transformers_logging.get_verbosity(), hub_logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars_off = hub.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hub_logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logger.setLevel(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
        if not hub_bars_off:
            hub.enable_progress_bars()
