"""Whether a report shows the place of a fact when a token of the answer is chosen, read off the page itself.

    python benchmarks/explain_needles.py --json result.json

A fact is planted at each depth of a text, one report a fact. Each report is opened in headless Chromium at a phone's
width, every digit of the answer is chosen in turn, and the passages that the page lists are read. Without `--file` the
text is the Python language reference out of the standard library. With the default model and 8,192 tokens a report
takes one to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dsa.documents import SourceDocument
from dsa.documents.prompt import make_prompt
from dsa.eval.needle_kinds import Needle, make_needles
from dsa.models.loading import LoadedModel, load_model
from dsa.models.sparse import attach_indexers
from dsa.report.explaining import explain
from dsa.report.explanation import Explanation
from dsa.report.page import write_page
from dsa.runs.machine import describe_machine
from dsa.testing.browser import choose_answer_token, chromium, opened_report
from dsa.text import read_text

ROOM = 128
"""Tokens for the question, the answer and what is read again to compare times."""
PAGE_CHARACTERS = 2000
WIDTH = 390


def language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def planted(text: str, needle: Needle, depth: float, tokens: int, tokenizer: Any) -> SourceDocument:
    """The first tokens of a text with the fact after the sentence that ends next to the depth, on pages."""
    starts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    taken = text[: starts[tokens - ROOM][0]]
    aim = int(depth * len(taken))
    ends = [found.end() for found in re.finditer(r"[.!?]\s", taken)]
    place = min(ends, key=lambda end: abs(end - aim))
    whole = taken[:place].rstrip() + needle.sentences[0] + taken[place:].lstrip()
    pages = [whole[start : start + PAGE_CHARACTERS] for start in range(0, len(whole), PAGE_CHARACTERS)]
    # The fact is on one page.
    for number in range(1, len(pages)):
        cut = pages[number - 1].rfind("\n") + 1
        pages[number - 1 : number + 1] = [pages[number - 1][:cut], pages[number - 1][cut:] + pages[number]]
    return SourceDocument.of_pages("planted.pdf", pages)


def question_of(needle: Needle) -> tuple[str, str]:
    """The question, and the words that the answer begins with."""
    found = re.fullmatch(r"\s*Question: (.*)\nAnswer: (.*)", needle.prompts[0], flags=re.DOTALL)
    assert found is not None
    return found[1], found[2]


def made(loaded: LoadedModel, document: SourceDocument, needle: Needle) -> tuple[Explanation, float]:
    """The explanation of the question about the fact, and seconds."""
    asked, begin = question_of(needle)
    # As `dsa eval --tasks needles` asks: without a chat template, in which small models answer less well.
    prompt = make_prompt(loaded.tokenizer, document, asked, chat=False, begin=begin)
    began = time.perf_counter()
    return explain(loaded, document, prompt, ask=asked, new_tokens=8), time.perf_counter() - began


def looked_up(browser: Any, report: Path, explanation: Explanation, needle: Needle, page: int) -> list[dict[str, Any]]:
    """For every digit of the answer: at which place the page lists the fact's passage, and whether with its page."""
    fact = needle.sentences[0].strip()
    found: list[dict[str, Any]] = []
    with opened_report(browser, report, WIDTH) as view:
        for number, written in enumerate(explanation.answer):
            if not written.text.strip().isdigit():
                continue
            listed = choose_answer_token(view, number)
            holding = [place for place, each in enumerate(listed, 1) if is_about(each, fact)]
            rank = min(holding, default=None)
            shown = rank is not None and f"page {page} " in listed[rank - 1]
            found.append({"token": written.text, "rank": rank, "with_its_page": shown})
    return found


def is_about(passage: str, fact: str) -> bool:
    """Whether a listed passage is the fact or, where it was cut, an end of it."""
    words = passage.replace("\n", " ")
    return fact[-24:] in words or fact[:24] in words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--file", type=Path, help="UTF-8 text to plant the facts in")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of text and question, about")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--top-k", type=int, help="tokens read per query; by default the indexers' own")
    parser.add_argument("--seed", type=int, default=0, help="of the facts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    text = read_text(given.file, "file") if given.file else language_reference()
    loaded = load_model(given.model)
    report, _ = attach_indexers(loaded, **({} if given.top_k is None else {"top_k": given.top_k}))
    needles = make_needles(random.Random(given.seed))
    result: dict[str, Any] = {
        "model": given.model,
        "text": given.file.name if given.file else "pydoc_data.topics",
        "config": report.config.to_dict(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        result["environment"] = describe_machine(torch.device("cpu")) | {"chromium": browser.version}
        for depth, needle in zip(given.depths, needles, strict=False):
            document = planted(text, needle, depth, given.tokens, loaded.tokenizer)
            page = document.page_of(document.text.index(needle.sentences[0].strip()))
            explanation, seconds = made(loaded, document, needle)
            file = write_page(Path(folder) / "report.html", explanation)
            row = {
                "depth": depth,
                "page": page,
                "prompt_tokens": len(explanation.prompt.ids),
                "fact": needle.sentences[0].strip(),
                "answer": "".join(each.text for each in explanation.answer),
                "is_right": needle.answers[0].strip() in "".join(each.text for each in explanation.answer),
                "tokens": looked_up(browser, file, explanation, needle, page),
                "seconds": round(seconds, 1),
                "report_mb": file.stat().st_size / 1e6,
            }
            row["is_shown"] = bool(row["tokens"]) and all(each["rank"] for each in row["tokens"])
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
