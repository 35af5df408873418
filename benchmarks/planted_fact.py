#!/usr/bin/env python3
"""A fact planted in a real PDF and asked for: the answer's log-probability with DSA beside dense, and what was read.

    python benchmarks/planted_fact.py report.pdf --pages 1-50 --page 25 --json fact.json --report fact.html

A sentence such as "The locker number of Captain Doraki is 80213." stands among the words of one page. The document is
read twice, dense and as `dsa explain` reads it, with the same stretched positions where it is longer than the model's,
and the answer is put behind the question both times, whatever the model would have said. Printed, and written to
`--json`: the log-probability of every token of the answer, and at which place of the report's most read passages the
page comes for each of them.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsa.bench.result import environment
from dsa.cli.console import Steps, notes
from dsa.documents import Page, SourceDocument, read_source
from dsa.documents.prompt import Prompt, make_prompt
from dsa.eval.comparison import new_cache
from dsa.eval.free_memory import check_room
from dsa.eval.needle_kinds import make_needles
from dsa.eval.output import check_writable, write_json
from dsa.eval.progress import Progress, layer_progress
from dsa.models.attachment import report_of
from dsa.models.context import DSAContext
from dsa.models.extension import Demand, chosen_scaling
from dsa.models.loading import LoadedModel, attach_indexers, load_model
from dsa.models.rope import scaling_of
from dsa.report.explanation import CHUNK, Explanation, explain
from dsa.report.page import write_page

TOLERANCE = 0.1
"""Nats that the answer may be off with DSA."""
ENDS = (". ", ".\n", "! ", "? ")


def plant(document: SourceDocument, number: int, sentence: str) -> SourceDocument:
    """Puts a sentence on a page, behind the end of a sentence near the middle of its text.

    Args:
        document: One with pages.
        number: The page's.
        sentence: What is put there, as the page's words are.

    Raises:
        ValueError: There is no such page, or it has no text.
    """
    found = [page for page in document.pages if page.number == number]
    if not document.has_pages or not found:
        known = f"{document.pages[0].number} to {document.pages[-1].number}" if document.has_pages else "none"
        raise ValueError(f"page: {document.name} has no page {number} among those read ({known})")
    (page,) = found
    if page.start == page.end:
        raise ValueError(f"page: page {number} of {document.name} has no text; take another")
    middle = (page.start + page.end) // 2
    ends = [place + len(end) for end in ENDS if (place := document.text.find(end, middle, page.end)) >= 0]
    place = min(ends, default=middle)
    added = f"{sentence.strip()} "
    moved = (
        Page(each.number, each.start + len(added) * (each.start > place), each.end + len(added) * (each.end >= place))
        for each in document.pages
        if each.start < each.end
    )
    return SourceDocument(document.text[:place] + added + document.text[place:], document.name, tuple(moved))


@torch.no_grad()
def read_dense(loaded: LoadedModel, prompt: Prompt, answer: list[int], progress: Progress) -> tuple[list[float], float]:
    """Log-probability of every token of the answer with dense attention, and seconds of reading the prompt."""
    model = loaded.model
    cache = new_cache(model, len(prompt.ids) + len(answer))
    chunks = torch.tensor([prompt.ids], device=model.device).split(CHUNK, dim=1)
    began = time.perf_counter()
    found: list[float] = []
    with layer_progress(model, f"Reading {len(prompt.ids):,} tokens dense", progress, len(chunks)):
        for chunk in chunks:
            output = _forward(model, chunk, cache)
    seconds = time.perf_counter() - began
    for token in answer:
        found.append(float(output.logits[0, -1].float().log_softmax(dim=-1)[token]))
        if len(found) < len(answer):
            output = _forward(model, torch.tensor([[token]], device=model.device), cache)
    return found, seconds


def _forward(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, dsa_context=DSAContext(mode="dense"))


def compare(explanation: Explanation, page: int, dense: list[float]) -> dict[str, Any]:
    """What the two readings gave, token by token, and whether the page is among the most read.

    Args:
        explanation: Of the answer put behind the question.
        page: Where the fact stands.
        dense: Log-probabilities of the answer's tokens with dense attention.
    """
    tokens = []
    for told, log_dense in zip(explanation.to_json()["tokens"], dense, strict=True):
        pages = [each["page"] for each in told["passages"]]
        rank = pages.index(page) + 1 if page in pages else None
        log_dsa = math.log(max(told["probability"], sys.float_info.min))
        tokens.append(
            {
                "text": told["text"],
                "log_probability_dsa": log_dsa,
                "log_probability_dense": log_dense,
                "rank_of_page": rank,
                "passages_shown": len(pages),
                "window_missed": told["window_missed"],
            }
        )
    dsa_sum, dense_sum = (
        sum(each[name] for each in tokens) for name in ("log_probability_dsa", "log_probability_dense")
    )
    return {
        "tokens": tokens,
        "log_probability_dsa": dsa_sum,
        "log_probability_dense": dense_sum,
        "difference": dsa_sum - dense_sum,
        "tolerance": TOLERANCE,
        "is_within": abs(dsa_sum - dense_sum) <= TOLERANCE,
        "is_below": dsa_sum < dense_sum - TOLERANCE,
        "tokens_with_page": sum(each["rank_of_page"] is not None for each in tokens),
        "page_is_among_most_read": any(each["rank_of_page"] is not None for each in tokens),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the comparison."""
    print(f"{result['sentence']}  (page {result['page']} of {result['document']}, {result['prompt_tokens']:,} tokens)")
    print(f"{'token':<10}{'dense':>10}{'DSA':>10}   place of page {result['page']} among the most read passages")
    for each in result["tokens"]:
        rank = each["rank_of_page"] or "none"
        row = f"{each['log_probability_dense']:>10.4f}{each['log_probability_dsa']:>10.4f}   {rank}"
        print(f"{each['text']!r:<10}{row} of {each['passages_shown']}")
    beyond = "below" if result["is_below"] else "above"
    verdict = f"within {TOLERANCE}" if result["is_within"] else f"{beyond} dense by more than {TOLERANCE}"
    print(
        f"{'all':<10}{result['log_probability_dense']:>10.4f}{result['log_probability_dsa']:>10.4f}   "
        f"difference {result['difference']:+.4f} nats, {verdict}"
    )
    dense_s, dsa_s = result["dense_read_s"], result["dsa_read_s"]
    print(f"read in {dense_s:.0f} s dense, {dsa_s:.0f} s with DSA; {result['rope'] or 'plain RoPE'}")


def run(given: argparse.Namespace, steps: Steps) -> dict[str, Any]:
    """Everything."""
    for path, argument in ((given.json, "json"), (given.report, "report")):
        if path is not None:
            check_writable(path, argument)
    document = read_source(given.file, progress=steps, pages=given.pages)
    page = given.page or document.pages[len(document.pages) // 2].number
    needle = make_needles(random.Random(given.seed))[0]
    (sentence,), (question,), (told,) = needle.sentences, needle.prompts, needle.answers
    planted = plant(document, page, sentence)
    asked, _, begin = question.strip().removeprefix("Question: ").partition("\nAnswer: ")

    def asking(tokenizer: Any) -> tuple[Prompt, list[int]]:
        prompt = make_prompt(tokenizer, planted, asked, chat=False, begin=begin)
        return prompt, tokenizer(told, add_special_tokens=False)["input_ids"]

    def demand(tokenizer: Any) -> Demand:
        prompt, answer = asking(tokenizer)
        read = prompt.parts.count("document")
        return Demand(read, len(prompt.ids) - read, len(answer))

    scaling = chosen_scaling(given.model, given.rope_scaling, given.indexers, demand)
    loaded = load_model(given.model, device=given.device, status=steps.status, rope_scaling=scaling)
    overrides = {} if given.top_k is None else {"top_k": given.top_k}
    attach_indexers(loaded, given.indexers, **overrides)
    check_room(loaded, report_of(loaded.model).config, demand(loaded.tokenizer), CHUNK)
    prompt, answer = asking(loaded.tokenizer)
    explanation = explain(loaded, planted, prompt, ask=asked, answer=answer, progress=steps)
    if given.report is not None:
        write_page(given.report, explanation)
    dense, dense_s = read_dense(loaded, prompt, answer, steps)
    return {
        "document": Path(given.file).name,
        "pages": given.pages,
        "page": page,
        "sentence": sentence.strip(),
        "question": asked,
        "prompt_tokens": len(prompt.ids),
        "seed": given.seed,
        "model": given.model,
        "rope": scaling_of(loaded.model.config),
        "config": explanation.report.config.to_dict(),
        **compare(explanation, page, dense),
        "dsa": asdict(explanation.dsa),
        "dsa_read_s": explanation.dsa.prefill_s,
        "dense_read_s": dense_s,
        "environment": environment(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="PDF")
    parser.add_argument("--pages", help="read these pages only: 1-50")
    parser.add_argument("--page", type=int, metavar="N", help="where the fact stands; by default the middle page read")
    parser.add_argument("--model", default="default")
    parser.add_argument("--indexers", help="as in `dsa eval`; by default those shipped with the model")
    parser.add_argument("--top-k", type=int, metavar="K", help="by default the indexers' own")
    parser.add_argument("--rope-scaling", help="by default YaRN as far as needed")
    parser.add_argument("--seed", type=int, default=0, help="of the fact")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--report", type=Path, metavar="OUT", help="write the report of `dsa explain` there, too")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        with notes(), Steps() as steps:
            result = run(given, steps)
        show(result)
        if given.json is not None:
            write_json(given.json, result)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
