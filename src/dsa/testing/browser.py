"""Headless Chromium through Playwright, for tests, benchmarks and pictures of reports.

The browser is the system's own; both imports and the search for it happen when one is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
SIZES = {390: 844, 1280: 900}
"""Widths of views and their heights: a phone and a desk."""


class NoBrowserError(RuntimeError):
    """Playwright or Chromium is missing; says which and how to get it."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's synchronous interface.

    Raises:
        NoBrowserError: Playwright or Chromium is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowserError(f"needs the Python package playwright: pip install playwright ({error})") from error
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise NoBrowserError("needs Chromium, e.g. Debian's package chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def opened_report(browser: Any, report: Path, width: int, scheme: str = "light", timeout_s: int = 120) -> Iterator[Any]:
    """A report in a view of this width, ready to be used.

    Args:
        browser: What `chromium` gave.
        report: The HTML file.
        width: One of `SIZES`.
        scheme: `"light"` or `"dark"`.
        timeout_s: How long it may take to open, and every step after that.
    """
    context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme)
    try:
        page = context.new_page()
        page.set_default_timeout(1000 * timeout_s)
        page.goto(report.absolute().as_uri())
        page.wait_for_selector("main[aria-busy=false]")
        yield page
    finally:
        context.close()


def choose_answer_token(page: Any, number: int) -> list[str]:
    """Chooses a token of the answer, counted from 0, and reads the passages that the report lists for it, in order."""
    page.locator("#tokens [role=option]:not(.asked)").nth(number).click()
    return page.locator("#passages li").all_inner_texts()
