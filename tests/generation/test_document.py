"""`dsa.open`: a document is read once, asked many times, and says where an answer was read."""

from pathlib import Path
from typing import Any

import pytest
import torch

import dsa
from dsa.documents import SourceDocument
from dsa.documents.prompt import Turn, make_conversation, make_prompt
from dsa.generation.passages import Passage, tells
from dsa.generation.sources import Watch, pages_in_words, sources_of
from dsa.store import ModelStore, Store
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


def test_a_follow_up_is_asked_after_what_was_said() -> None:
    tokenizer, model = tiny_tokenizer(), made()
    session = dsa.open(model, tokenizer, DOCUMENT)
    first = session.ask("Which?", max_new_tokens=NEW)
    second = session.ask("And who?", follow_up=True, max_new_tokens=NEW)
    assert (first.turns, second.turns) == (0, 1)
    turns = [Turn("Which?", first.token_ids), Turn("And who?")]
    prompt = make_conversation(tokenizer, DOCUMENT, turns)
    assert session.session.token_ids[: len(prompt.ids)] == prompt.ids
    # Nothing but the new words, and the token that was written last.
    assert second.timings.read == 1 + prompt.parts[::-1].index("answer")
    assert [turn.ask for turn in session.turns] == ["Which?", "And who?"]
    # Given as texts to a new session it is the same conversation.
    told = [Turn("Which?", first.text)]
    other = dsa.open(model, tokenizer, DOCUMENT, turns=told).ask("And who?", follow_up=True, max_new_tokens=NEW)
    assert other.turns == 1
    session.forget()
    assert session.ask("Which?", follow_up=True, max_new_tokens=NEW).token_ids == first.token_ids
    assert session.ask("Who?", max_new_tokens=NEW).turns == 0
    assert [turn.ask for turn in session.turns] == ["Who?"]


def test_a_conversation_needs_no_document() -> None:
    session = dsa.open(made(), tiny_tokenizer())
    session.ask("Which?", max_new_tokens=NEW)
    answer = session.ask("And who?", follow_up=True, max_new_tokens=NEW)
    assert answer.turns == 1
    assert answer.timings.held > len("Which?")
    with pytest.raises(ValueError, match="there is no document"):
        dsa.open(made(), tiny_tokenizer(), tokens=5)


def test_the_oldest_turns_give_way_to_the_positions() -> None:
    session = dsa.open(made(), tiny_tokenizer(), DOCUMENT)
    given = [session.ask("What is it about?", follow_up=True, max_new_tokens=20).turns for _ in range(6)]
    assert given[:2] == [0, 1]
    assert max(given) < 5
    assert len(session.session.token_ids) <= 256
    # The document is not read again for it.
    assert session.answer is not None
    assert session.answer.timings.held >= len(DOCUMENT.text)


def test_stopped_before_the_prompt_was_read() -> None:
    session = dsa.open(made(), tiny_tokenizer(), DOCUMENT, stop=lambda: True)
    answer = session.ask("Which?", max_new_tokens=NEW)
    assert (answer.text, answer.token_ids, session.turns) == ("", [], [])


def test_a_store_outlives_the_session(tmp_path: Path) -> None:
    # Long enough to be worth a place.
    text = "A text of some length, to be read once and asked many times. " * 18
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=2048).double()
    dsa.attach(model, TINY_CONFIG)
    with dsa.open(model, tiny_tokenizer(), text, store=tmp_path / "store") as first:
        expected = first.ask("Which?", max_new_tokens=NEW)
        followed = first.ask("And who?", follow_up=True, max_new_tokens=NEW)
        turns = first.turns
    again = dsa.open(model, tiny_tokenizer(), text, store=tmp_path / "store")
    answer = again.ask("Which?", max_new_tokens=NEW)
    assert answer.token_ids == expected.token_ids
    assert answer.timings.held > 1000
    # The conversation goes on in another session, and its turns are not read again.
    store = ModelStore(Store(tmp_path / "store"), model)
    later = dsa.open(model, tiny_tokenizer(), text, store=store, turns=turns)
    asked = later.ask("Why?", follow_up=True, max_new_tokens=NEW)
    assert asked.timings.opened == len(first.session.token_ids)
    assert asked.turns == 2
    assert followed.timings.read < asked.timings.opened
