"""Whether a plot can be drawn, asked before the long run that makes its figures."""

from __future__ import annotations

from pathlib import Path

FORMATS = (".png", ".svg", ".pdf")
INSTALL = "pip install 'dsa-attention[plot]'"


def check_plot(path: Path) -> None:
    """Makes sure, before a long run, that a plot can be drawn into this file.

    Raises:
        ValueError: The name's ending is no format that can be drawn.
        ImportError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot: expected a file name that ends in {', '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plot: drawing needs matplotlib, which is not installed: {INSTALL}") from error
