"""The next turn of a conversation about a stored document reads only its new words, in another process, too."""

from pathlib import Path
from typing import Any

import pytest

from dsa.generation.session import Session
from dsa.store import Store
from dsa.testing.stored import DOCUMENT, MODELS, NEW, QUESTION, attached, flip, only_entry, session
from dsa.testing.tiny_models import tiny_tokens

TURNS = [tiny_tokens(1, 5 + turn, seed=20 + turn)[0].tolist() for turn in range(4)]


def turn(session: Session, prompt: list[int]) -> list[int]:
    session.read(prompt, new_tokens=NEW, keep=len(DOCUMENT))
    written = list(session.write(NEW))
    session.keep_answer()
    return written


@pytest.mark.parametrize("kind", MODELS)
def test_every_turn_in_a_process_of_its_own(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    plain, held = Session(model, chunk=32), 0
    prompt = list(DOCUMENT)
    for words in TURNS:
        prompt += words
        expected = turn(plain, prompt)
        other = session(model, tmp_path)
        assert turn(other, prompt) == expected
        assert other.timings.opened == held
        assert other.timings.read == len(prompt) - held
        # What was written last is read with the next turn.
        held = len(prompt) + NEW - 1
        prompt += expected
        assert len(list(only_entry(tmp_path).folder.glob("tail-*"))) == 1
    assert Store(tmp_path).verify(only_entry(tmp_path)) == ""
    # Another question about the document takes the document, or for windows what it can.
    asked = [*DOCUMENT, *QUESTION]
    again = session(model, tmp_path)
    assert turn(again, asked) == turn(Session(model, chunk=32), asked)
    assert again.timings.opened == len(DOCUMENT)
    assert len(list(only_entry(tmp_path).folder.glob("tail-*"))) == 2


@pytest.fixture(scope="module")
def llama() -> Any:
    return attached()


def test_a_turn_that_was_put_otherwise_takes_what_is_the_same(llama: Any, tmp_path: Path) -> None:
    prompt = [*DOCUMENT, *TURNS[0]]
    answered = [*prompt, *turn(session(llama, tmp_path), prompt)]
    other = [*answered[: len(prompt) + 2], *TURNS[1]]
    again = session(llama, tmp_path)
    assert turn(again, other) == turn(Session(llama, chunk=32), other)
    assert again.timings.opened == len(prompt) + 2


def test_a_grown_document_does_not_disturb_them(llama: Any, tmp_path: Path) -> None:
    prompt = [*DOCUMENT, *TURNS[0]]
    answered = [*prompt, *turn(session(llama, tmp_path), prompt), *TURNS[1]]
    grown = session(llama, tmp_path)
    grown.read([*DOCUMENT, *TURNS[2]])
    grown.close()
    assert only_entry(tmp_path).state.tokens == len(DOCUMENT) + len(TURNS[2])
    again = session(llama, tmp_path)
    assert turn(again, answered) == turn(Session(llama, chunk=32), answered)
    assert again.timings.opened == len(prompt) + NEW - 1


def test_a_conversation_without_a_document_grows(llama: Any, tmp_path: Path) -> None:
    prompt, held = list(DOCUMENT[:40]), 0
    for words in TURNS:
        prompt += words
        kept = session(llama, tmp_path)
        kept.read(prompt, new_tokens=NEW)
        assert kept.timings.opened == held
        written = list(kept.write(NEW))
        kept.keep_answer()
        held = len(prompt) + NEW - 1
        prompt += written
    assert only_entry(tmp_path).state.tokens == len(prompt) - NEW
    assert len(list(only_entry(tmp_path).folder.glob("tail-*"))) == 1


def test_a_damaged_one_is_named_and_its_turns_read_again(
    llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = [*DOCUMENT, *TURNS[0]]
    for place in (-3, 20):
        answered = [*prompt, *turn(session(llama, tmp_path), prompt), *TURNS[1]]
        [tail] = only_entry(tmp_path).folder.glob("tail-*")
        flip(tail, tail.stat().st_size + place if place < 0 else place)
        assert tail.name in Store(tmp_path).verify(only_entry(tmp_path))
        again = session(llama, tmp_path)
        assert turn(again, answered) == turn(Session(llama, chunk=32), answered)
        assert again.timings.opened == len(DOCUMENT)
        assert f"{tail.name} is damaged: a conversation was kept there" in caplog.text
        assert tail.with_name(f"damaged-{tail.name}").exists()
        Store(tmp_path).remove_unused()
        assert not list(only_entry(tmp_path).folder.glob("damaged-*"))
        for each in only_entry(tmp_path).folder.glob("tail-*"):
            each.unlink()


def test_no_more_than_the_most_are_kept(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.store.tails.MOST", 3)
    for number in range(5):
        turn(session(llama, tmp_path), [*DOCUMENT, 40 + number, *QUESTION])
    assert len(list(only_entry(tmp_path).folder.glob("tail-*"))) == 3
