#!/usr/bin/env python3
"""Writes docs/families.md from the table of families and the reasons for what is refused.

python scripts/families_page.py            # after a change of either
python scripts/families_page.py --check    # is it current? a test asks the same
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from dsa.models.listing import Listed, causal_models

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

HEAD = "<!-- Written by scripts/families_page.py: change the tables in src/dsa/models, then run it. -->"


INTRODUCTION = (
    "Of the {all} causal language models of transformers, {working} run sparse. Each is put through the "
    "[claims](check.md) on a small random model: a budget of all tokens gives transformers' own logits and greedy "
    "tokens, a small one those of eager attention masked to what was selected; caches, padding, packing, chunks, "
    "beams, saving and a training step. `dsa info --models` prints this list."
)

LAYERS = (
    "Layers with full attention get an indexer. Layers with a window, chunks, linear attention, a state or a "
    "convolution stay as they are, with their caches. Two documents in one row (packing) stay apart only where "
    "transformers' own model keeps them apart: a state runs on."
)

REASONS = "Each by name and with its reason. A model of another name can be tried with [dsa check](check.md)."


def page() -> str:
    """The page."""
    listed = causal_models()
    working, refused = [each for each in listed if each.works], [each for each in listed if each.state == "refused"]
    parts = [HEAD, "# Models", INTRODUCTION.format(all=len(listed), working=len(working)), LAYERS]
    parts += [
        "## Works",
        _table(working),
        "## Refused",
        REASONS,
        _table(refused),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Listed]) -> str:
    ordered = sorted(rows, key=lambda row: (row.note, row.model_type))
    groups = [
        (note, [f"`{row.model_type}`" for row in group]) for note, group in groupby(ordered, lambda row: row.note)
    ]
    groups.sort(key=lambda group: -len(group[1]))
    lines = [f"| {note[0].upper()}{note[1:]} | {', '.join(names)} |" for note, names in groups]
    return "\n".join(["| | `model_type` |", "|---|---|", *lines])


def main() -> None:
    """Writes the page, or says that it is not current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is not current: run python scripts/families_page.py")


if __name__ == "__main__":
    main()
