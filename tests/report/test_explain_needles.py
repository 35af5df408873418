"""What a token read most is what the page lists when the token is chosen; and where the benchmark plants its facts."""

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsa.report.explanation import Explanation
from dsa.report.page import write_page
from dsa.testing.browser import choose_answer_token, opened_report
from dsa.testing.scripts import load_script
from dsa.testing.synthetic_report import synthetic_explanation
from dsa.testing.tiny_tokenizer import tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "explain_needles.py"
DEPTHS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(SCRIPT)


def listed(passage: str) -> str:
    """A passage as the page lists it."""
    return " ".join(passage.split())[:60]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_lists_what_was_read_most(browser: Any, page_file: Path, explanation: Explanation, width: int) -> None:
    with opened_report(browser, page_file, width) as page:
        for number in range(len(explanation.answer)):
            shown = choose_answer_token(page, number)
            best = explanation.most_read(explanation.query_of(number))
            assert len(shown) == len(best)
            # The page has the attention in steps of a twelfth: neighbours may have changed places.
            first = explanation.passages[best[0].passage]
            assert any(f"page {first.page} " in each or first.page is None for each in shown[:3])


def test_a_passage_at_any_depth_is_seen_when_the_token_that_read_it_is_chosen(browser: Any, tmp_path: Path) -> None:
    explanation = synthetic_explanation(4000, top_k=256, layers=6, asked=8, answered=len(DEPTHS))
    document = explanation.prompt.document_tokens
    places = [next(each for each in explanation.passages if each.end > depth * document) for depth in DEPTHS]
    for number, place in enumerate(places):
        for layer, row in explanation.recorder.rows[explanation.query_of(number)].items():
            if layer:
                # As much attention more as a retrieval head gives: a tenth, on the selected tokens next to the passage.
                near = (row.positions >= place.start) & (row.positions < place.end)
                row.positions[4] = place.start if not near.any() else row.positions[4]
                near = (row.positions >= place.start) & (row.positions < place.end)
                row.positions, order = row.positions.sort()
                row.weights = row.weights[order]
                row.weights[near[order]] += 0.1 / int(near.sum())
    file = write_page(tmp_path / "report.html", explanation)
    with opened_report(browser, file, 390) as page:
        for number, place in enumerate(places):
            first = choose_answer_token(page, number)[0]
            assert listed(explanation.text(place.start, place.end)) in listed(first.partition("tokens back")[2])
            assert f"page {place.page} " in first


def test_facts_are_planted_where_asked(benchmark: ModuleType) -> None:
    tokenizer = tiny_tokenizer()
    needle = benchmark.make_needles(random.Random(1))[0]
    text = "A sentence that says little. Another one! " * 500
    for depth in DEPTHS:
        document = benchmark.planted(text, needle, depth, 8192, tokenizer)
        place = document.text.index(needle.sentences[0].strip())
        assert abs(place / len(document.text) - depth) < 0.02
        page = document.pages[document.page_of(place) - 1]
        assert needle.sentences[0].strip() in document.text[page.start : page.end]
        assert document.text[:place].rstrip()[-1] in ".!"
    asked = benchmark.question_of(needle)
    assert f"\n\nQuestion: {asked[0]}\nAnswer: {asked[1]}" == needle.prompts[0]


def test_a_listed_passage_is_recognised(benchmark: ModuleType) -> None:
    fact = "The catalogue number of the Dorate manuscript is 12345."
    assert benchmark.is_about(
        "page 3 · 2 % of the attention\nThe catalogue number of the Dorate manuscript is 12345.", fact
    )
    assert benchmark.is_about("Dorate manuscript is 12345. And then", fact)
    assert not benchmark.is_about("The catalogue of the manuscript is 54321.", fact)
