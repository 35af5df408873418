#!/usr/bin/env python3
"""Takes the pictures of docs/explain.md: a report of the guide, wide and at a phone's width, light and dark.

    python scripts/explain_screenshots.py

makes the report with the default model, about a minute on two idle cores, and photographs it in headless Chromium.
The model goes on with a sentence of the guide, which a small one does better than answering.
`--report FILE` photographs one that is there already.
"""

from __future__ import annotations

import argparse
import base64
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsa.testing.browser import SIZES, choose_answer_token, chromium, opened_report

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
BEGIN = "In the default model an indexer has"
CHOSEN = "4"
QUALITY = 65


def make_report(out: Path) -> None:
    command = [sys.executable, "-m", "dsa", "explain", "default", "--file", "guide.md", "--begin", BEGIN]
    options = ["--top-k", "512", "--max-new-tokens", "16", "--out", str(out.absolute())]
    subprocess.run([*command, *options], cwd=ROOT / "docs", check=True)


def take(browser: Any, report: Path, width: int, scheme: str, out: Path) -> None:
    """One picture: the token of the answer that holds the number, and the first passage followed into the text."""
    with opened_report(browser, report, width, scheme) as page:
        texts = page.locator("#tokens [role=option]:not(.asked)").all_inner_texts()
        number = next((place for place, text in enumerate(texts) if text.strip() == CHOSEN), 0)
        choose_answer_token(page, number)
        page.locator("#passages button").first.click()
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(0, 0)
        page.wait_for_timeout(300)
        sent = page.context.new_cdp_session(page).send(
            "Page.captureScreenshot", {"format": "webp", "quality": QUALITY, "optimizeForSpeed": False}
        )
        out.write_bytes(base64.b64decode(sent["data"]))
        print(f"{out} {out.stat().st_size / 1e3:.0f} KB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a report to photograph, in place of making one")
    parser.add_argument("--out", type=Path, default=IMAGES, help="the directory for the pictures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        report = given.report or Path(folder) / "report.html"
        if given.report is None:
            make_report(report)
        for width in SIZES:
            for scheme in ("light", "dark"):
                take(browser, report, width, scheme, given.out / f"explain-{width}-{scheme}.webp")


if __name__ == "__main__":
    main()
