"""The report as one HTML file that needs nothing else and asks for nothing.

A content security policy in the page forbids every request, and every script and style but its own, which it names by
their hashes. Text of the document is put into the page by scripts as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsa.report.explanation import Cost, Explanation
from dsa.report.packing import meta, pack, visible
from dsa.runs.files import check_writable, write_atomically

SCRIPTS = ("data.js", "shading.js", "maps.js", "panel.js", "main.js")
"""In the order in which they are joined to one module."""


def render(explanation: Explanation) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined

    folder = files("dsa.report") / "page"
    style = (folder / "report.css").read_text("utf-8")
    script = "\n".join((folder / name).read_text("utf-8") for name in SCRIPTS)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,.0f}"
    prompt = explanation.prompt
    return environment.from_string((folder / "report.html.j2").read_text("utf-8")).render(
        document=visible(explanation.document),
        model=visible(explanation.model),
        ask=None if explanation.ask is None else visible(explanation.ask),
        prompt_tokens=len(prompt.ids),
        document_tokens=prompt.parts.count("document"),
        pages=len({page for page in prompt.pages if page is not None}),
        notes=explanation.notes,
        config=explanation.report.config,
        kept=explanation.mass_kept,
        kept_window=explanation.mass_kept_window,
        answer=visible(explanation.answer_text.strip()),
        recording=explanation.recorder.seconds,
        costs=_costs(explanation.dsa, explanation.dense),
        is_estimated=explanation.dense.is_estimated,
        environment=explanation.environment,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        meta=_embedded(meta(explanation)),
        arrays=pack(explanation),
    )


def write_page(path: str | Path, explanation: Explanation) -> Path:
    """Writes the page, whole or not at all.

    Raises:
        OSError: The file cannot be written; what was there before is still there.
    """
    file = check_writable(path, "out")
    write_atomically(file, render(explanation).encode("utf-8", errors="replace"), "out")
    return file


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _embedded(plain: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(plain, separators=(",", ":")).replace("<", "\\u003c")


def _costs(dsa: Cost, dense: Cost) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what, DSA, dense, how many times."""

    def row(what: str, own: float | None, other: float | None, form: str, about: bool = False) -> tuple:
        shown = ["\u2013" if each is None else form.format(each) for each in (own, other)]
        if about and other is not None:
            shown[1] = f"\u2248 {shown[1]}"
        times = "\u2013" if not own or other is None else f"{other / own:.2f}\u00d7"
        return what, *shown, times

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else 1000 * seconds

    return [
        row("tokens read per query and layer, mean", dsa.read, dense.read, "{:,.0f}"),
        row("reading the prompt, seconds", dsa.prefill_s, dense.prefill_s, "{:,.1f}", dense.is_estimated),
        row("one more token, milliseconds", milliseconds(dsa.decode_s), milliseconds(dense.decode_s), "{:,.0f}"),
        row("keys, values and index keys, MB", dsa.cache_mb, dense.cache_mb, "{:,.0f}"),
        row("peak memory of the process, MB", dsa.peak_rss_mb, dense.peak_rss_mb, "{:,.0f}"),
    ]
