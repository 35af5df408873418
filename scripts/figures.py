#!/usr/bin/env python3
"""Writes the figures of README.md and docs/ that come from a record or from `dsa cost`.

A figure is a number with its name in a comment right after it: `113<!-- e2e.131072.dsa.ms -->`. Every name has one
source below, so that two pages that name a quantity give the same number.

    python scripts/figures.py            # after a new record
    python scripts/figures.py --check    # are all current? a test asks the same
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(?P<number>[\d.,]*\d)<!-- (?P<name>[\w.-]+) -->")

# The pages say machine and date of these records in words: a newer record means reading those sentences again.
DEMO = "2026-11-25-demo.json"
END_TO_END = "2026-11-29-e2e.json"
STORE = "2026-12-01-store.json"


def figures() -> dict[str, str]:
    """Every figure by its name, as it is written."""
    return {**_demo(), **_end_to_end(), **_store(), **_memory()}


def _demo() -> dict[str, str]:
    record = json.loads((RESULTS / DEMO).read_text())
    digits = {"perplexity": ".3f", "perplexity_ratio": ".3f", "tokens_read_mean": ",.0f", "prefill_s": ".1f"}
    digits |= {"decode_tokens_per_s": ".1f", "peak_rss_mb": ",.0f"}
    found = {}
    for quantity, form in digits.items():
        for reader in ("dense", "dsa", "window"):
            if (value := record.get(f"{quantity}_{reader}")) is not None:
                found[f"demo.{quantity}_{reader}"] = format(value, form)
    for reader in ("dsa", "window"):
        lost = 100 * (record[f"perplexity_ratio_{reader}"] - 1)
        found[f"demo.perplexity_percent_{reader}"] = f"{lost:.1f}"
        found[f"demo.mass_ratio_{reader}"] = f"{record[f'mass_kept_{reader}'] / record['mass_kept_oracle']:.3f}"
    return found


def _end_to_end() -> dict[str, str]:
    rows = json.loads((RESULTS / END_TO_END).read_text())["rows"]
    found = {}
    for row in rows:
        if row["name"] == "decode" and row["length"]:
            found |= _times(f"e2e.{row['length']}", row, "SDPA", "DSA")
        elif row["name"] in ("short", "prompt"):
            found |= _times(f"e2e.{row['name']}.token", row, "SDPA token", "DSA token")
            prefill = _times(f"e2e.{row['name']}.prefill", row, "SDPA prefill", "DSA prefill")
            found |= {name: text for name, text in prefill.items() if name.endswith("ratio")}
            for reader in ("SDPA", "DSA"):
                seconds = row["timings"][f"{reader} prefill"]["median_s"]
                found[f"e2e.{row['name']}.prefill.{reader.lower()}.s"] = f"{seconds:.{2 if seconds < 10 else 0}f}"
        elif row["name"] == "decode":
            found["e2e.growth"] = f"{row['figures'][0]['value']:.2f}"
    return found


def _times(name: str, row: dict[str, Any], dense: str, sparse: str) -> dict[str, str]:
    """Milliseconds of both, and how many times less the sparse one takes."""
    seconds = {"sdpa": row["timings"][dense]["median_s"], "dsa": row["timings"][sparse]["median_s"]}
    ratio = next(each["value"] for each in row["figures"] if each["name"] in ("SDPA / DSA", _ratio_name(name)))
    written = {f"{name}.{reader}.ms": f"{1000 * value:,.0f}" for reader, value in seconds.items()}
    return written | {
        f"{name}.ratio": f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 1.5 else f"{ratio:.2f}"
    }


def _ratio_name(name: str) -> str:
    return "prefill, SDPA / DSA" if name.endswith("prefill") else "decode, SDPA / DSA"


def _store() -> dict[str, str]:
    record = json.loads((RESULTS / STORE).read_text())
    reading, large, limited = record["reading"], record["large"], record["limited"]
    return {
        "store.read.s": f"{reading['without']['first_token_s']:.0f}",
        "store.opened.s": f"{reading['warm']['first_token_s']:.2f}",
        "store.opened.ratio": f"{reading['first_token_again_over_opened']:.0f}",
        "store.cold.s": f"{reading['cold']['first_token_s']:.1f}",
        "store.cold.ratio": f"{reading['first_token_again_over_opened_cold']:.0f}",
        "store.keeping.ratio": f"{reading['reading_with_store_over_without']:.2f}",
        "store.large.open.s": f"{large['from_page_cache']['open_s']:.2f}",
        "store.large.own.gb": f"{large['from_page_cache']['rss_mb']['RssAnon'] / 1000:.1f}",
        "store.limited.gb": f"{limited['limited']['kv_bytes'] / 1e9:.0f}",
        "store.limited.ms": f"{limited['limited']['token_ms']:.0f}",
        "store.unlimited.ms": f"{limited['unlimited']['token_ms']:.0f}",
    }


def _memory() -> dict[str, str]:
    """Gigabytes of weights, indexers and caches at 32,768 tokens, two bytes a number."""
    from dsa.cost import config_for, model_report, read_model

    found = {}
    for model in ("Qwen3-0.6B", "SmolLM2-1.7B", "Qwen3-8B"):
        shape, own = read_model(model)
        report = model_report(shape, config_for(shape, own), tokens=32_768, decoded=0)
        memory = report["variants"]["dsa"]["memory"]
        found[f"memory.{model}"] = f"{sum(memory.values()) / 1e9:.1f}"
    return found


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_figures(text: str, known: dict[str, str]) -> str:
    """The text with every marked number as its source says; an unknown name is a `KeyError`."""
    return MARK.sub(lambda mark: f"{known[mark['name']]}<!-- {mark['name']} -->", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether all figures are current")
    given = parser.parse_args()
    known = figures()
    for page in pages():
        text = page.read_text()
        written = with_figures(text, known)
        if written == text:
            continue
        if given.check:
            raise SystemExit(f"{page.relative_to(ROOT)} has other figures than the records: run scripts/figures.py")
        page.write_text(written)


if __name__ == "__main__":
    main()
