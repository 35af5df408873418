"""Every field of a stored document's JSON, mutated: it is named damaged and read again, or opened rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsa.store.entry import CHECKS, ROWS, STATE, Entry, checks_of, load
from dsa.store.layout import LayoutError
from dsa.testing.mutations import dumps, mutations
from dsa.testing.stored import DOCUMENT, NEW, QUESTION, attached, only_entry, session


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and the store with one document that it read."""
    model, folder = attached(), tmp_path_factory.mktemp("store")
    first = session(model, folder)
    first.read([*DOCUMENT, *QUESTION], new_tokens=NEW, keep=len(DOCUMENT))
    list(first.write(NEW))
    first.close()
    return model, folder


def looked_at(folder: Path) -> Entry | None:
    """The entry, or `None` where it is said to be damaged; nothing else may happen."""
    try:
        entry = load(folder)
        checks_of(entry)
    except LayoutError:
        return None
    return entry


@pytest.mark.parametrize("name", [STATE, CHECKS])
def test_files(kept: tuple[Any, Path], name: str) -> None:
    folder = only_entry(kept[1]).folder
    before = (folder / name).read_text()
    for _, value in mutations(json.loads(before)):
        (folder / name).write_text(dumps(value))
        looked_at(folder)
    (folder / name).write_text(before)
    assert looked_at(folder) is not None


def test_what_the_header_says_of_the_layers(kept: tuple[Any, Path]) -> None:
    """Metadata of the same length in the file, so that its rows stay where they are."""
    model, store = kept
    folder = only_entry(store).folder
    with (folder / ROWS).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        before = file.read(length)
    header = json.loads(before)

    def write(content: bytes) -> None:
        with (folder / ROWS).open("r+b") as file:
            file.seek(8)
            file.write(content.ljust(length))

    for field in ("layers", "binding"):
        plain = json.loads(header["__metadata__"][field])
        for number, (_, value) in enumerate(mutations(plain, depth=2)):
            metadata = {**header["__metadata__"], field: dumps(value)}
            changed = json.dumps({**header, "__metadata__": metadata}).encode()
            if len(changed) > length:
                continue
            write(changed)
            if looked_at(folder) is not None and number % 40 == 0 and field == "layers":
                other = session(model, store)
                other.read([*DOCUMENT, *QUESTION], new_tokens=NEW, keep=None)
                other.close()
    write(before)
    assert looked_at(folder) is not None
