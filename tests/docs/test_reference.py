"""The API reference has a place for every public name. Its text comes from the docstrings."""

import re
from pathlib import Path

import pytest

import dsa
from dsa import ops

PAGES = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize(
    ("pages", "module", "names"),
    [("dsa.md", "dsa", [name for name in dsa.__all__ if name != "ops"]), ("ops/*.md", "dsa.ops", ops.__all__)],
)
def test_every_public_name_is_there(pages: str, module: str, names: list[str]) -> None:
    # An operation's function has the name of its folder, which is what the shorter path would be.
    text = "\n".join(file.read_text() for file in sorted(PAGES.glob(pages)))
    listed = re.findall(rf"^::: {module}\.(?:\w+\.)?(\w+)$", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(names)
    for name in names:
        assert getattr(dsa if module == "dsa" else ops, name).__doc__
