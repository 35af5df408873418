"""`dsa.open`: a document is read once, asked many times, and says where an answer was read."""

from pathlib import Path
from typing import Any

import pytest
import torch

import dsa
from dsa.documents import SourceDocument
from dsa.documents.prompt import make_prompt
from dsa.generation.passages import Passage, tells
from dsa.generation.sources import Watch, pages_in_words, sources_of
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

PAGES = ("The first page tells of trees and stones.", "The second page tells of the sea. 43", "A third one, of roads.")
DOCUMENT = SourceDocument.of_pages("three.pdf", PAGES)
NEW = 6


def made(attached: bool = True) -> Any:
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY).double()
    model.generation_config.eos_token_id = None
    if attached:
        dsa.attach(model, TINY_CONFIG)
    return model


def test_it_is_read_once() -> None:
    session = dsa.open(made(), tiny_tokenizer(), DOCUMENT)
    first = session.ask("Which?", max_new_tokens=NEW)
    assert first.timings.held == 0
    second = session.ask("Who?", max_new_tokens=NEW)
    assert second.timings.held >= len(DOCUMENT.text.rstrip())
    assert second.timings.read < 30
    fresh = dsa.open(made(), tiny_tokenizer(), DOCUMENT).ask("Who?", max_new_tokens=NEW)
    assert second.token_ids == fresh.token_ids
    assert len(second.token_ids) == NEW
    assert second.sources == fresh.sources
    assert {each.page for each in second.sources.pages} <= {1, 2, 3}
    assert second.sources.passages


def test_pieces_are_the_answer() -> None:
    session = dsa.open(made(), tiny_tokenizer(), "A text that is no path.")
    pieces = list(session.stream("Which?", max_new_tokens=NEW))
    answer = session.answer
    assert answer is not None
    assert "".join(pieces) == answer.text == session.ask("Which?", max_new_tokens=NEW).text
    stream = session.stream("Which?", max_new_tokens=NEW)
    next(stream)
    stream.close()
    assert session.answer is not None
    assert len(session.answer.token_ids) < NEW
    assert session.ask("Which?", max_new_tokens=NEW).text == answer.text


def test_a_plain_model_has_no_sources(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(PAGES[0])
    answer = dsa.open(made(attached=False), tiny_tokenizer(), str(file)).ask("Which?", max_new_tokens=NEW)
    assert len(answer.token_ids) == NEW
    assert answer.sources.pages == answer.sources.passages == ()


@pytest.mark.parametrize(
    ("document", "options", "question", "expected"),
    [
        ("", {}, "Which?", "document: expected a path or a text"),
        ("a text", {"pages": "1"}, "Which?", "pages: a text has no pages"),
        (DOCUMENT, {"pages": "1"}, "Which?", "has been read already"),
        ("a text", {}, " ", "question: expected a text"),
    ],
)
def test_mistakes(document: Any, options: dict[str, Any], question: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        dsa.open(made(attached=False), tiny_tokenizer(), document, **options).ask(question)


def test_sources_are_where_the_attention_is() -> None:
    prompt = make_prompt(tiny_tokenizer(), DOCUMENT, "Which?")
    weights = torch.zeros(len(prompt.ids))
    weights[[place for place, page in enumerate(prompt.pages) if page == 3]] = 0.02
    weights[[place for place, page in enumerate(prompt.pages) if page == 1]] = 0.01
    # What lies on the question is no source.
    weights[-5:] = 1.0
    sources = sources_of(weights, prompt, pages=3, passages=1)
    assert pages_in_words(sources.pages, DOCUMENT) == "p. 3, 1"
    assert [each.page for each in sources.passages] == [3]
    assert sum(each.share for each in sources.pages) == pytest.approx(1, abs=0.01)
    assert sources_of(torch.zeros(len(prompt.ids)), prompt, pages=3, passages=1).pages == ()
    assert Watch(TINY_CONFIG, 4).sources(prompt).passages == ()


def test_headers_and_white_space_say_nothing() -> None:
    texts = [f"Annual report of the company {page}" for page in range(3)] + [". 43", " \n", "It was signed by a clerk."]
    passages = [Passage(number, number + 1, number, "document") for number in range(len(texts))]
    assert tells(passages, texts) == [False] * 5 + [True]


def test_a_store_outlives_the_session(tmp_path: Path) -> None:
    # Long enough to be worth a place.
    text = "A text of some length, to be read once and asked many times. " * 18
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=2048).double()
    dsa.attach(model, TINY_CONFIG)
    with dsa.open(model, tiny_tokenizer(), text, store=tmp_path / "store") as first:
        expected = first.ask("Which?", max_new_tokens=NEW)
    again = dsa.open(model, tiny_tokenizer(), text, store=tmp_path / "store").ask("Which?", max_new_tokens=NEW)
    assert again.token_ids == expected.token_ids
    assert again.timings.held > 1000
