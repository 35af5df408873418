"""Figures in README.md and docs/ are those of the records, and one quantity has one figure."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_the_figures_of_the_records(script: ModuleType) -> None:
    known = script.figures()
    named = set()
    for page in script.pages():
        text = page.read_text()
        assert script.with_figures(text, known) == text, f"{page.name}: run scripts/figures.py"
        named |= {mark["name"] for mark in script.MARK.finditer(text)}
    assert len(named) > 20


def test_another_number_is_found(script: ModuleType) -> None:
    known = script.figures()
    text = f"{known['e2e.131072.dsa.ms']}<!-- e2e.131072.dsa.ms --> ms"
    assert script.with_figures(f"9,999{text[text.index('<') :]}", known) == text


def test_a_mark_always_follows_a_number(script: ModuleType) -> None:
    """One that does not would never be compared."""
    for page in script.pages():
        text = page.read_text()
        assert len(re.findall(r"<!-- (?:demo|e2e|memory|store)\.", text)) == len(script.MARK.findall(text)), page.name


def test_times_of_the_records_are_named_through_marks_only(script: ModuleType) -> None:
    """README, guide and benchmarks: a decoding time of the end-to-end record without a mark is a second source."""
    known = script.figures()
    times = {text for name, text in known.items() if name.startswith("e2e.") and name.endswith(".ms")}
    for name in ("README.md", "docs/guide.md", "docs/benchmarks.md"):
        plain = script.MARK.sub("", (ROOT / name).read_text())
        found = {number for number in re.findall(r"([\d,.]*\d) ms\b", plain) if number in times}
        assert not found, f"{name}: {found} without a mark"
