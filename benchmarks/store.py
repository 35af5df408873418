#!/usr/bin/env python3
"""What the document store saves on the embedded default model: reading against opening, and what opening takes.

python benchmarks/store.py --tokens 32768 --large 131072 --json OUT

A document of real text is read without the store and with it, then asked about from the store: with its files in the
page cache, and after they were dropped from it. An entry of `--large` tokens has random rows, because its size is what
matters; it is opened and asked about in a process of its own, whose memory is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dsa.generation.session import Session
from dsa.models.loading import LoadedModel, load_model
from dsa.models.sparse import attach_indexers
from dsa.runs.files import write_json
from dsa.runs.inputs import encode, read_document
from dsa.runs.machine import describe_machine, peak_rss_mb
from dsa.store import ModelStore, Store
from dsa.store.entry import Entry, State, check_of, publish
from dsa.store.layout import TOKEN_IDS, capacity_for, create, plan
from dsa.store.recording import as_bytes, layers_of, metadata_of, storages_of, write_all

QUESTION = "\n\nQuestion: What is said about the order in which operands are evaluated?\nAnswer:"
CHUNK = 4096


def opened_model(tokens: int) -> LoadedModel:
    """The default model with its indexers, and positions for so many tokens."""
    factor = -(-4 * (tokens + 512) // 8192) / 4
    scaling = {"rope_type": "yarn", "factor": factor} if factor > 1 else None
    loaded = load_model("default", rope_scaling=scaling)
    attach_indexers(loaded, None)
    return loaded


def asked(loaded: LoadedModel, store: ModelStore | None, ids: list[int], keep: int, new: int) -> dict[str, Any]:
    """One prompt and its answer; seconds."""
    session = Session(loaded.model, store=store)
    session.read(ids, new_tokens=new, keep=keep)
    written = list(session.write(new))
    began = time.perf_counter()
    session.close()
    taken = session.timings
    token_ms = None if taken.token_s is None else 1e3 * taken.token_s
    return {
        "written": written,
        "opened": taken.opened,
        "open_s": taken.open_s,
        "read": taken.read,
        "read_s": taken.read_s,
        "first_token_s": taken.first_token_s,
        "token_ms": token_ms,
        "close_s": time.perf_counter() - began,
    }


def drop(entry: Entry) -> None:
    """Drops an entry's files from the page cache."""
    for file in entry.folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def reading(tokens: int, folder: Path, new: int) -> dict[str, Any]:
    """A document of `tokens` tokens, read and asked about."""
    loaded = opened_model(tokens)
    document = encode(read_document(), loaded.tokenizer, tokens)[0].tolist()
    ids = [*document, *loaded.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]]
    began = time.perf_counter()
    store = ModelStore(Store(folder), loaded.model, "default")
    bound = time.perf_counter() - began
    # What a first pass sets up is not the document's.
    Session(loaded.model).read(document[:512])
    without = asked(loaded, None, ids, tokens, new)
    kept = asked(loaded, store, ids, tokens, new)
    [entry] = store.store.entries()
    warm = asked(loaded, store, ids, tokens, new)
    drop(entry)
    cold = asked(loaded, store, ids, tokens, new)
    same = [each["written"] == without["written"] for each in (kept, warm, cold)]
    for each in (without, kept, warm, cold):
        del each["written"]
    return {
        "tokens": tokens,
        "fingerprint_s": bound,
        "entry_bytes": entry.bytes,
        "same_tokens": same,
        "without_store": without,
        "keeping": kept,
        "from_page_cache": warm,
        "after_dropping_it": cold,
        "reading_with_store_over_without": kept["read_s"] / without["read_s"],
        "first_token_again_over_opened": without["first_token_s"] / warm["first_token_s"],
        "first_token_again_over_opened_cold": without["first_token_s"] / cold["first_token_s"],
    }


def make_large(tokens: int, folder: Path) -> None:
    """An entry with random rows."""
    loaded = opened_model(tokens)
    binding = ModelStore(Store(folder), loaded.model).binding
    session = Session(loaded.model)
    ids = torch.randint(20, 1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    session.read(ids[:CHUNK])
    rows: dict[str, Any] = {TOKEN_IDS: (torch.int32, ())}
    storages = storages_of(session.cache)
    for name, storage in storages.items():
        rows[name] = (storage.dtype, tuple(storage.shape[2:]))
    metadata = {**metadata_of(binding, "default", "random rows"), "layers": json.dumps(layers_of(session.cache))}
    layout = plan(rows, capacity_for(tokens), metadata)
    place = folder / "entries" / "0123456789ab"
    place.mkdir(parents=True)
    handle = create(place / "rows.safetensors", layout)
    checks = []
    for begin in range(0, tokens, CHUNK):
        data = {name: as_bytes(storage[0, :CHUNK]) for name, storage in storages.items()}
        data[TOKEN_IDS] = as_bytes(torch.tensor(ids[begin : begin + CHUNK], dtype=torch.int32))
        for name, each in data.items():
            write_all(handle, each, layout.parts[name].place(begin))
        checks.append(check_of(begin + CHUNK, data))
    os.fsync(handle)
    os.close(handle)
    publish(place, State(tokens), checks)


def ask_large(tokens: int, folder: Path, new: int, dropped: bool) -> dict[str, Any]:
    """Opens the large entry and asks about it, in this process."""
    loaded = opened_model(tokens)
    store = ModelStore(Store(folder), loaded.model)
    [entry] = store.store.entries()
    if dropped:
        drop(entry)
    before = peak_rss_mb()
    ids = [*entry.token_ids().tolist(), *loaded.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]]
    result = asked(loaded, store, ids, tokens, new)
    del result["written"]
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status if line.startswith("Rss"))
    resident = {name: int(value.split()[0]) / 1024 for name, value in lines.items()}
    return {**result, "peak_rss_mb": peak_rss_mb(), "peak_rss_mb_before": before, "rss_mb": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--large", type=int, default=131072)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where to keep; by default a temporary folder")
    parser.add_argument("--ask-large", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dropped", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask_large is not None:
        print(json.dumps(ask_large(given.large, given.ask_large, given.new, given.dropped)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        result: dict[str, Any] = {"reading": reading(given.tokens, Path(made) / "store", given.new)}
        print(json.dumps(result, indent=1), flush=True)
        large = Path(made) / "large"
        make_large(given.large, large)
        for name, more in (("large_from_page_cache", []), ("large_after_dropping_it", ["--dropped"])):
            command = [sys.executable, __file__, "--ask-large", str(large), "--large", str(given.large), *more]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            result[name] = json.loads(finished.stdout.splitlines()[-1])
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    if given.json is not None:
        write_json(given.json, {**result, "environment": describe_machine(torch.device("cpu"))})


if __name__ == "__main__":
    main()
