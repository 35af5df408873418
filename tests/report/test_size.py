"""A report of 150,000 tokens stays below 20 MB, however much was selected, and opens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsa.report.page import write_page
from dsa.testing.synthetic_report import synthetic_explanation

TOKENS = 150_000
LARGEST = 20_000_000


@pytest.fixture(scope="module", params=[1024, 3000], ids=["K1024", "K3000"])
def long_page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    explanation = synthetic_explanation(TOKENS, top_k=request.param)
    return write_page(tmp_path_factory.mktemp("long") / "report.html", explanation)


def test_it_is_small(long_page: Path) -> None:
    assert long_page.stat().st_size < LARGEST


def test_it_opens_and_can_be_used(browser: Any, long_page: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(120_000)
    page.goto(long_page.as_uri())
    page.wait_for_selector("main[aria-busy=false]")
    before = page.inner_text("#passages")
    page.locator("#tokens [role=option]").last.click()
    page.wait_for_function("before => document.getElementById('passages').innerText !== before", arg=before)
    page.fill("#page", "300")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.block span[style]').length > 0")
    # Of the text only what is near the view is cut into spans.
    assert page.locator("#pane *").count() < 20_000
    page.close()


def test_synthetic_rows_are_selections() -> None:
    explanation = synthetic_explanation(2000, top_k=128, layers=3, asked=4, answered=4)
    assert len(explanation.queries) == 7
    for query in explanation.queries:
        for layer, row in explanation.recorder.rows[query].items():
            assert len(row.positions) == (128 if layer else query + 1)
            assert bool((row.positions.diff() > 0).all())
            assert int(row.positions[0]) == 0
            assert int(row.positions[-1]) == query
            assert float(row.weights.sum()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(explanation.recorder.rows[1996][1].positions[:4], torch.arange(4).int())
