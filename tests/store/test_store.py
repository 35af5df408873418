"""A document that was read is opened, and what is written after it is what reading it again gives."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dsa
from dsa.generation.session import Session
from dsa.models.attached import indexers_of
from dsa.store import Damaged, ModelStore, Store, binding_of
from dsa.store.entry import Entry
from dsa.testing.stored import DOCUMENT, MODELS, NEW, QUESTION, attached, flip, only_entry, session
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def answer(session: Session, prompt: list[int], keep: int | None = None) -> list[int]:
    session.read(prompt, new_tokens=NEW, keep=keep)
    written = list(session.write(NEW))
    session.close()
    return written


def test_a_document_is_read_once(model: Any, tmp_path: Path) -> None:
    prompt = [*DOCUMENT, *QUESTION]
    expected = answer(Session(model, chunk=32), prompt)
    first = session(model, tmp_path / "store")
    assert answer(first, prompt, keep=len(DOCUMENT)) == expected
    assert first.timings.opened == 0
    assert first.kept is not None
    assert first.kept.tokens == len(DOCUMENT)
    for question in (QUESTION, QUESTION[:3], tiny_tokens(1, 40, seed=8)[0].tolist()):
        other = session(model, tmp_path / "store")
        asked = [*DOCUMENT, *question]
        assert answer(other, asked, keep=len(DOCUMENT)) == answer(Session(model, chunk=32), asked)
        assert other.timings.opened == len(DOCUMENT)
        assert other.timings.read == len(question)
        assert other.kept is None
    [entry] = Store(tmp_path / "store").entries()
    assert Store(tmp_path / "store").verify(entry) == ""
    with safe_open(entry.rows, "pt") as file:
        assert file.get_slice("token_ids")[0, : entry.state.tokens].tolist() == DOCUMENT


@pytest.fixture(scope="module")
def llama() -> Any:
    return attached()


def test_five_turns(llama: Any, tmp_path: Path) -> None:
    plain, kept = Session(llama, chunk=32), session(llama, tmp_path)
    turns = list(DOCUMENT)
    for turn in range(5):
        turns += tiny_tokens(1, 7, seed=turn)[0].tolist()
        expected = answer(plain, turns)
        assert answer(kept, turns, keep=len(DOCUMENT)) == expected
        # The next turn in another process, which has only what is on disk.
        assert answer(session(llama, tmp_path), turns, keep=len(DOCUMENT)) == expected
        turns += expected


def test_a_growing_document_is_gone_on_with(llama: Any, tmp_path: Path) -> None:
    answer(session(llama, tmp_path), DOCUMENT[:60], keep=60)
    grown = session(llama, tmp_path)
    assert answer(grown, [*DOCUMENT, *QUESTION], keep=90) == answer(Session(llama, chunk=32), [*DOCUMENT, *QUESTION])
    assert (grown.timings.opened, grown.timings.read) == (60, 39)
    assert only_entry(tmp_path).state.tokens == 90
    assert Store(tmp_path).verify(only_entry(tmp_path)) == ""


def test_a_changed_document_is_opened_as_far_as_it_is_the_same(llama: Any, tmp_path: Path) -> None:
    answer(session(llama, tmp_path), DOCUMENT)
    changed = [*DOCUMENT[:50], *tiny_tokens(1, 40, seed=9)[0].tolist()]
    assert changed[50] != DOCUMENT[50]
    other = session(llama, tmp_path)
    assert answer(other, changed) == answer(Session(llama, chunk=32), changed)
    assert other.timings.opened == 50
    assert sorted(entry.state.tokens for entry in Store(tmp_path).entries()) == [90, 90]
    assert not [problem for entry in Store(tmp_path).entries() if (problem := Store(tmp_path).verify(entry))]


def test_windows_open_where_there_is_a_copy_of_them(tmp_path: Path) -> None:
    model = attached("gemma3_text")
    answer(session(model, tmp_path), DOCUMENT)
    assert only_entry(tmp_path).state.windows == (32, 64, 90)
    other = session(model, tmp_path)
    changed = [*DOCUMENT[:70], *QUESTION]
    assert answer(other, changed, keep=70) == answer(Session(model, chunk=32), changed)
    assert other.timings.opened == 64


def test_what_decides_the_rows_is_a_miss(llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer(session(llama, tmp_path), DOCUMENT)
    binding = only_entry(tmp_path).binding
    others: list[tuple[Any, set[str]]] = [
        (attached(), set()),
        (
            attached("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            {"config.rope_parameters", "weights"},
        ),
    ]
    fewer = tiny_model("llama").double()
    dsa.attach(fewer, TINY_CONFIG.replace(top_k=16))
    others.append((fewer, {"dsa.top_k"}))
    single = tiny_model("llama")
    dsa.attach(single, TINY_CONFIG)
    others.append((single, {"dtype", "weights", "indexers"}))
    trained = attached()
    with torch.no_grad():
        next(iter(indexers_of(trained)[0].parameters()))[0] += 1
    others.append((trained, {"indexers"}))
    tuned = attached()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-9
    others.append((tuned, {"weights"}))
    for model, fields in others:
        caplog.clear()
        found = set(binding.differences(binding_of(model)))
        assert found == fields or (fields and found and found <= fields), (found, fields)
        opened = ModelStore(Store(tmp_path), model, least=16).open(DOCUMENT)
        assert (opened is None) == bool(fields)
        said = caplog.text.partition("read with other values of ")[2]
        assert bool(said) == bool(fields)
        assert all(field in said for field in sorted(found)[:3])


def damage_index(entry: Entry) -> None:
    flip(entry.rows, entry.layout.parts["layers.1.index"].place(40))


def damage_ids(entry: Entry) -> None:
    flip(entry.rows, entry.layout.parts["token_ids"].place(0))


def damage_header(entry: Entry) -> None:
    flip(entry.rows, 12)


def cut(entry: Entry) -> None:
    os.truncate(entry.rows, entry.layout.size - 4096)


def damage_state(entry: Entry) -> None:
    (entry.folder / "state.json").write_text('{"version": 1')


def damage_sums(entry: Entry) -> None:
    (entry.folder / "checks.json").write_text("[]")


@pytest.mark.parametrize("damage", [damage_index, damage_ids, damage_header, cut, damage_state, damage_sums])
def test_damage_is_named_and_the_text_read_again(
    llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Entry], None]
) -> None:
    expected = answer(session(llama, tmp_path), DOCUMENT)
    entry = only_entry(tmp_path)
    damage(entry)
    again = session(llama, tmp_path)
    assert answer(again, DOCUMENT) == expected
    assert again.timings.opened == 0
    assert f"the stored document {entry.name} is damaged" in caplog.text
    assert only_entry(tmp_path).state.tokens == 90
    assert [each.name for each in Store(tmp_path).look() if isinstance(each, Damaged)] == [entry.name]
    assert answer(session(llama, tmp_path), DOCUMENT) == expected
    Store(tmp_path).remove_unused()
    assert len(list(Store(tmp_path).look())) == 1


def test_verify_finds_what_opening_does_not_read(llama: Any, tmp_path: Path) -> None:
    answer(session(llama, tmp_path), DOCUMENT)
    entry = only_entry(tmp_path)
    flip(entry.rows, entry.layout.parts["layers.0.value"].place(70))
    assert Store(tmp_path).verify(entry) == "layers.0.value is damaged between tokens 64 and 90"


def test_a_newer_version_is_left_alone(llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer(session(llama, tmp_path), DOCUMENT)
    state = only_entry(tmp_path).folder / "state.json"
    state.write_text(state.read_text().replace('"version": 1', '"version": 9'))
    assert ModelStore(Store(tmp_path), llama, least=16).open(DOCUMENT) is None
    assert "is left alone: it is of version 9, and this dsa reads 1" in caplog.text
    assert state.exists()


def test_only_the_user_can_read_it(llama: Any, tmp_path: Path) -> None:
    answer(session(llama, tmp_path / "store"), DOCUMENT)
    modes = {place: place.stat().st_mode & 0o777 for place in (tmp_path / "store").rglob("*")}
    assert {mode for place, mode in modes.items() if place.is_dir()} == {0o700}
    assert {mode for place, mode in modes.items() if place.is_file()} == {0o600}


def test_a_full_disk_keeps_nothing_and_answers(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    kept = session(llama, tmp_path)
    assert answer(kept, DOCUMENT) == answer(Session(llama, chunk=32), DOCUMENT)
    assert kept.kept is None
    assert "the document is not kept: the disk is full" in caplog.text
    monkeypatch.undo()
    assert Store(tmp_path).entries() == []
    assert not list((tmp_path / "entries").iterdir())


def test_a_disk_that_cannot_be_written_keeps_nothing_and_answers(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    answer(session(llama, tmp_path), DOCUMENT[:60])
    for place in ("dsa.store.folder.start", "dsa.store.entry.os.utime", "dsa.store.tails.write_tensors"):
        monkeypatch.setattr(place, refuse)
    kept = session(llama, tmp_path)
    assert answer(kept, DOCUMENT) == answer(Session(llama, chunk=32), DOCUMENT)
    kept.keep_answer()
    # What is there is opened all the same.
    assert kept.timings.opened == 60
    assert kept.kept is None
    assert caplog.text.count("the document is not kept") == 1
    assert "Read-only file system" in caplog.text


def test_least_recently_used_goes_first_and_never_what_is_in_use(llama: Any, tmp_path: Path) -> None:
    texts = [tiny_tokens(1, 40, seed=seed)[0].tolist() for seed in (11, 12, 13)]
    for age, text in enumerate(texts):
        answer(session(llama, tmp_path), text)
        name = Store(tmp_path).find(binding_of(llama), text)
        assert name is not None
        os.utime(name[0].folder / "state.json", (1000 + age, 1000 + age))
    store = ModelStore(Store(tmp_path, limit=0), llama, least=16)
    opened = store.open([*texts[0], 5])
    assert opened is not None
    assert store.store.is_in_use(opened.name)
    assert len(store.store.remove_unused()) == 2
    assert [entry.name for entry in store.store.entries()] == [opened.name]
    # Removed by name all the same, and what is mapped can still be read.
    store.store.remove(only_entry(tmp_path))
    assert opened.cache.layers[0].keys.isfinite().all()
    del opened
    gc.collect()


def test_a_text_larger_than_memory_lies_in_the_file(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsa.store.recording.available_memory", lambda device: 1000)
    monkeypatch.setattr("dsa.store.opening.available_memory", lambda device: 1000)
    kept = session(llama, tmp_path)
    assert answer(kept, [*DOCUMENT, *QUESTION], keep=90) == answer(Session(llama, chunk=32), [*DOCUMENT, *QUESTION])
    assert Store(tmp_path).verify(only_entry(tmp_path)) == ""
    assert answer(session(llama, tmp_path), [*DOCUMENT, *QUESTION], keep=90) == answer(
        Session(llama, chunk=32), [*DOCUMENT, *QUESTION]
    )


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a directory; give another path, or --no-store"):
        Store(tmp_path / "file")


def test_two_sessions_read_the_same_document(llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = session(llama, tmp_path), session(llama, tmp_path)
    reading = first.chunks([*DOCUMENT, *QUESTION], new_tokens=NEW, keep=90)
    next(reading)
    expected = answer(Session(llama, chunk=32), [*DOCUMENT, *QUESTION])
    assert answer(second, [*DOCUMENT, *QUESTION], keep=90) == expected
    assert "another process is keeping the same document right now" in caplog.text
    list(reading)
    assert list(first.write(NEW)) == expected
    first.close()
    assert only_entry(tmp_path).state.tokens == 90
