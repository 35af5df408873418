#!/usr/bin/env python3
"""Facts planted in a real PDF and asked for: the answers' log-probability with DSA and dense, and what was read.

    python benchmarks/planted_fact.py report.pdf --pages 1-50 --json facts.json --report fact.html

Sentences such as "The locker number of Captain Doraki is 80213." stand among the words of pages all over the document.
It is read twice, dense and as `dsa explain` reads it, with the same stretched positions where it is longer than the
model's; then each fact is asked for after it, and the answer is put after the question both times, whatever the model
would have said. Printed, and written to `--json`: the log-probability of every answer, the mean difference with its
95 % interval over the facts, and at which place of the report's most read passages the page comes for every token of an
answer.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsa.bench.result import environment
from dsa.cli.console import notes
from dsa.cli.waiting import Steps
from dsa.documents import Page, SourceDocument, read_source
from dsa.documents.prompt import Prompt, make_prompt
from dsa.eval.interval import mean_interval
from dsa.eval.needle_kinds import DEPTHS, make_needles
from dsa.generation.room import check_room
from dsa.generation.session import PREFILL_CHUNK, Session
from dsa.models.attached import report_of
from dsa.models.context import DSAContext
from dsa.models.extension import Demand, chosen_scaling
from dsa.models.loading import LoadedModel, load_model
from dsa.models.rope import scaling_of
from dsa.models.sparse import attach_indexers
from dsa.report.explaining import explain
from dsa.report.explanation import Explanation
from dsa.report.page import write_page
from dsa.runs.files import check_writable, write_json
from dsa.runs.progress import Progress

TOLERANCE = 0.1
"""Nats that an answer may be off with DSA."""
ENDS = (". ", ".\n", "! ", "? ")


def plant(document: SourceDocument, number: int, sentence: str) -> SourceDocument:
    """Puts a sentence on a page, after the end of a sentence near the middle of its text.

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


@dataclass(frozen=True)
class Fact:
    """One fact, where it stands, and how it is asked for.

    Args:
        page: The page's number.
        sentence: What stands there.
        question: What is asked.
        prompt: Document and question.
        answer: Token ids of the answer.
    """

    page: int
    sentence: str
    question: str
    prompt: Prompt
    answer: list[int]


def spread(document: SourceDocument, count: int) -> list[int]:
    """Numbers of `count` pages with text, evenly spaced; of one, the middle page.

    Raises:
        ValueError: The document has fewer.
    """
    pages = [page.number for page in document.pages if page.start < page.end] if document.has_pages else []
    if len(pages) < count:
        raise ValueError(f"facts: {document.name} has {len(pages)} page(s) with text, got {count} facts for them")
    return [pages[(2 * number + 1) * len(pages) // (2 * count)] for number in range(count)]


def make_facts(tokenizer: Any, document: SourceDocument, pages: list[int], seed: int) -> list[Fact]:
    """Plants a fact on every page and asks for each after the whole.

    Raises:
        ValueError: As `plant`.
    """
    needles = make_needles(random.Random(seed))[: len(pages)]
    planted = document
    for needle, page in zip(needles, pages, strict=True):
        planted = plant(planted, page, needle.sentences[0])
    facts = []
    for needle, page in zip(needles, pages, strict=True):
        question, _, begin = needle.prompts[0].strip().removeprefix("Question: ").partition("\nAnswer: ")
        prompt = make_prompt(tokenizer, planted, question, chat=False, begin=begin)
        answer = tokenizer(needle.answers[0], add_special_tokens=False)["input_ids"]
        facts.append(Fact(page, needle.sentences[0].strip(), question, prompt, answer))
    return facts


def in_common(facts: list[Fact]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left."""
    ids = [fact.prompt.ids for fact in facts]
    shortest = min(map(len, ids)) - 1
    return next((place for place in range(shortest) if len({each[place] for each in ids}) > 1), shortest)


@dataclass(frozen=True)
class Told:
    """What dense attention gives an answer: every token's log-probability, and whether each is the likeliest."""

    logs: list[float]
    is_found: bool


def ask_dense(loaded: LoadedModel, facts: list[Fact], progress: Progress) -> tuple[list[Told], float]:
    """The log-probabilities of every answer with dense attention, and seconds of reading the document."""
    session, common = Session(loaded.model), in_common(facts)
    room = max(len(fact.prompt.ids) + len(fact.answer) for fact in facts) - common
    told = []
    with session.using(lambda: DSAContext(mode="dense")):
        session.read(facts[0].prompt.ids[:common], new_tokens=room, progress=progress)
        seconds = session.timings.read_s
        for fact in facts:
            session.read(fact.prompt.ids, new_tokens=len(fact.answer))
            logs, likeliest = [], []
            for token in fact.answer:
                logs.append(float(session.logits.log_softmax(dim=-1)[token]))
                likeliest.append(int(session.logits.argmax()))
                session.feed([token])
            told.append(Told(logs, likeliest == fact.answer))
    return told, seconds


def ask_dsa(
    loaded: LoadedModel, document: SourceDocument, facts: list[Fact], progress: Progress
) -> Iterator[Explanation]:
    """What `dsa explain` sees of every answer; the document is read for the first only."""
    session = Session(loaded.model)
    for fact in facts:
        yield explain(
            loaded, document, fact.prompt, ask=fact.question, answer=fact.answer, session=session, progress=progress
        )


def compare(explanation: Explanation, fact: Fact, dense: Told) -> dict[str, Any]:
    """What the two readings gave for one fact, token by token, and whether its page is among the most read.

    Args:
        explanation: Of the answer put after the question.
        fact: What was asked for.
        dense: What dense attention gave.
    """
    tokens = []
    for told, log_dense in zip(explanation.to_json()["tokens"], dense.logs, strict=True):
        pages = [each["page"] for each in told["passages"]]
        rank = pages.index(fact.page) + 1 if fact.page in pages else None
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
        "page": fact.page,
        "sentence": fact.sentence,
        "question": fact.question,
        "tokens": tokens,
        "log_probability_dsa": dsa_sum,
        "log_probability_dense": dense_sum,
        "difference": dsa_sum - dense_sum,
        "found_dense": dense.is_found,
        "tokens_with_page": sum(each["rank_of_page"] is not None for each in tokens),
    }


def summarise(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all facts and over those that dense attention finds, and how they compare with what is tolerated."""
    tokens = [token for each in facts for token in each["tokens"]]
    return {
        "tolerance": TOLERANCE,
        "all": _differences(facts),
        "found_dense": _differences([each for each in facts if each["found_dense"]]),
        "facts_within": sum(abs(each["difference"]) <= TOLERANCE for each in facts),
        "facts_with_page": sum(each["tokens_with_page"] > 0 for each in facts),
        "tokens_with_page": sum(token["rank_of_page"] is not None for token in tokens),
        "tokens": len(tokens),
    }


def _differences(facts: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not facts:
        return None
    difference, half_width = mean_interval([each["difference"] for each in facts])
    return {
        "facts": len(facts),
        "difference": difference,
        "half_width": half_width,
        "is_within": abs(difference) <= TOLERANCE,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the comparison."""
    facts, summary = result["facts"], result["summary"]
    print(f"{result['document']}, {result['prompt_tokens']:,} tokens, {result['rope'] or 'plain RoPE'}")
    print(f"{'page':>4} {'dense':>10}{'DSA':>10}{'difference':>12}   place of the page among the most read, by token")
    for each in facts:
        ranks = " ".join(f"{token['rank_of_page'] or '-'}" for token in each["tokens"])
        logs = "".join(f"{each[f'log_probability_{name}']:>10.4f}" for name in ("dense", "dsa"))
        star = "*" if each["found_dense"] else " "
        print(f"{each['page']:>4}{star}{logs}{each['difference']:>+12.4f}   {ranks}   {each['sentence']}")
    for which, name in (("all", "all facts"), ("found_dense", "those that dense attention finds (*)")):
        found = summary[which]
        if found is None:
            print(f"{name}: none")
            continue
        interval = "" if found["half_width"] is None else f" ± {found['half_width']:.4f} (95 %)"
        verdict = "within" if found["is_within"] else "off by more than"
        print(
            f"mean difference over {name}, {found['facts']}: {found['difference']:+.4f}{interval} nats an answer, "
            f"{verdict} {TOLERANCE}"
        )
    print(f"by itself within {TOLERANCE}: {summary['facts_within']} of {len(facts)} facts")
    shown = f"{summary['facts_with_page']} of {len(facts)} facts, {summary['tokens_with_page']} of {summary['tokens']}"
    print(f"page among the most read: for {shown} tokens")
    print(f"read in {result['dense_read_s']:.0f} s dense, {result['dsa_read_s']:.0f} s with DSA")


def run(given: argparse.Namespace, steps: Steps) -> dict[str, Any]:
    """Everything."""
    for path, argument in ((given.json, "json"), (given.report, "report")):
        if path is not None:
            check_writable(path, argument)
    document = read_source(given.file, progress=steps, pages=given.pages)
    pages = [given.page] if given.page is not None else spread(document, given.facts)
    asked: list[Fact] = []

    def demand(tokenizer: Any) -> Demand:
        if not asked:
            asked.extend(make_facts(tokenizer, document, pages, given.seed))
        longest = max(asked, key=lambda fact: len(fact.prompt.ids))
        read = longest.prompt.parts.count("document")
        return Demand(read, len(longest.prompt.ids) - read, len(longest.answer))

    scaling = chosen_scaling(given.model, given.rope_scaling, given.indexers, demand)
    loaded = load_model(given.model, device=given.device, status=steps.status, rope_scaling=scaling)
    overrides = {} if given.top_k is None else {"top_k": given.top_k}
    attach_indexers(loaded, given.indexers, **overrides)
    check_room(loaded, report_of(loaded.model).config, demand(loaded.tokenizer), PREFILL_CHUNK)
    explanations = list(ask_dsa(loaded, document, asked, steps))
    if given.report is not None:
        write_page(given.report, explanations[0])
    dense, dense_s = ask_dense(loaded, asked, steps)
    facts = [compare(*each) for each in zip(explanations, asked, dense, strict=True)]
    return {
        "document": Path(given.file).name,
        "pages": given.pages,
        "prompt_tokens": len(asked[0].prompt.ids),
        "seed": given.seed,
        "model": given.model,
        "rope": scaling_of(loaded.model.config),
        "config": explanations[0].report.config.to_dict(),
        "summary": summarise(facts),
        "facts": facts,
        "dsa": asdict(explanations[0].dsa),
        "dsa_read_s": explanations[0].dsa.prefill_s,
        "dense_read_s": dense_s,
        "environment": environment(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="PDF")
    parser.add_argument("--pages", help="read these pages only: 1-50")
    parser.add_argument("--facts", type=int, default=DEPTHS, choices=range(1, DEPTHS + 1), metavar="N", help="how many")
    parser.add_argument("--page", type=int, metavar="N", help="one fact, on this page; by default spread over all")
    parser.add_argument("--model", default="default")
    parser.add_argument("--indexers", help="as in `dsa eval`; by default those shipped with the model")
    parser.add_argument("--top-k", type=int, metavar="K", help="by default the indexers' own")
    parser.add_argument("--rope-scaling", help="by default YaRN as far as needed")
    parser.add_argument("--seed", type=int, default=0, help="of the facts")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--report", type=Path, metavar="OUT", help="write the first fact's report there")
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
