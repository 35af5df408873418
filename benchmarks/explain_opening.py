"""How large the report of a very long text is, and how long a browser takes to open and to use it.

    python benchmarks/explain_opening.py --json result.json

The report is made of synthetic selections, without a model (`dsa.testing.synthetic_report`). Each figure is the median
of several openings in headless Chromium, each in a fresh profile; the browser itself is running. Times are taken from
outside, until the page says that it can be used, or until what was asked for is drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsa.report.page import write_page
from dsa.runs.machine import describe_machine
from dsa.testing.browser import SIZES, chromium, opened_report
from dsa.testing.synthetic_report import synthetic_explanation

DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"

CHOOSE = "document.querySelector('#tokens [role=option]').click()"
SCROLL = "document.getElementById('pane').scrollTop *= 0.4"


def timed(page: Any, act: Callable[[], Any]) -> float:
    """Milliseconds until what an action changed is drawn."""
    began = time.perf_counter()
    act()
    page.evaluate(DRAWN)
    return 1000 * (time.perf_counter() - began)


def measure(browser: Any, report: Path, width: int, repeats: int) -> dict[str, float]:
    """Medians over some openings, times in seconds and milliseconds as named."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        began = time.perf_counter()
        with opened_report(browser, report, width) as page:
            page.evaluate(DRAWN)
            run = {"open_s": time.perf_counter() - began}
            run["choose_token_ms"] = timed(page, lambda: page.evaluate(CHOOSE))
            run["choose_layer_ms"] = timed(page, lambda: page.select_option("#layer", "7"))
            run["go_to_page_ms"] = timed(page, lambda: (page.fill("#page", "300"), page.keyboard.press("Enter")))
            run["shade_by_rate_ms"] = timed(page, lambda: page.check("[name=shade][value=rate]"))
            run["scroll_far_ms"] = timed(page, lambda: page.evaluate(SCROLL))
            run["memory_mb"] = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
        runs.append(run)
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1024, 3000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the reports here, and take those that are here already")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        for top_k in given.top_k:
            report = (given.folder or Path(temporary)) / f"{given.tokens}-{top_k}.html"
            if not report.exists():
                write_page(report, synthetic_explanation(given.tokens, top_k=top_k))
            for width in SIZES:
                row = {"tokens": given.tokens, "top_k": top_k, "width": width, "size_mb": report.stat().st_size / 1e6}
                rows.append(row | measure(browser, report, width, given.repeats))
                print(json.dumps(rows[-1]), flush=True)
        environment = describe_machine(torch.device("cpu")) | {"chromium": browser.version}
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
