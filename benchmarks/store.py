#!/usr/bin/env python3
"""What the document store saves on the embedded default model, and that nothing else changes.

    python benchmarks/store.py --json benchmarks/results/DATE-store.json
    python benchmarks/store.py --only kv --tokens 8192

reading    a document is read without the store and with it, then asked about from the store: with its files in the
           page cache, and after they were dropped from it
questions  the same greedy tokens with the store and without: 10 questions on each of 2 documents, and five turns
large      an entry of `--large` tokens is opened and asked about in a process of its own, whose memory is measured
limited    the same for an entry whose keys and values take `--limited-gb`, without a limit and under one of
           `--limit-gb` of memory (a control group)
kv         keys and values as fp32, bf16 and fp16, over at most 8,192 tokens: perplexity, size, time to read, time of a
           written token

Large entries have random rows, because their size is what matters; index keys vary, so that selections are spread. The
record is written after each part, and keeps the parts that are in the file and were not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsa.eval.reading import read
from dsa.generation.session import Session
from dsa.models.loading import LoadedModel, load_model
from dsa.models.sparse import attach_indexers
from dsa.runs.files import write_json
from dsa.runs.inputs import encode, read_document
from dsa.runs.machine import describe_machine, peak_rss_mb, reset_peak_rss
from dsa.store import ModelStore, Store
from dsa.store.entry import Entry, State, check_of, publish
from dsa.store.layout import TOKEN_IDS, capacity_for, create, plan
from dsa.store.recording import as_bytes, layers_of, metadata_of, storages_of, write_all

PARTS = ("reading", "questions", "large", "limited", "kv")
KINDS = ("fp32", "bf16", "fp16")
QUESTION = "\n\nQuestion: What is said about {}?\nAnswer:"
TOPICS = ("operands", "classes", "slices", "exceptions", "numbers", "strings", "modules", "names", "loops", "imports")
CHUNK = 4096
ROOM = 512
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def opened_model(tokens: int, **options: Any) -> LoadedModel:
    """The default model with its indexers, and positions for so many tokens."""
    factor = -(-4 * (tokens + ROOM) // 8192) / 4
    scaling = {"rope_type": "yarn", "factor": factor} if factor > 1 else None
    loaded = load_model("default", rope_scaling=scaling)
    attach_indexers(loaded, None, **options)
    return loaded


def question(loaded: LoadedModel, topic: str = "the order in which operands are evaluated") -> list[int]:
    return loaded.tokenizer(QUESTION.format(topic), add_special_tokens=False)["input_ids"]


def asked(session: Session, ids: list[int], keep: int, new: int) -> dict[str, Any]:
    """One prompt and its answer; seconds."""
    session.read(ids, new_tokens=new, keep=keep)
    written = list(session.write(new))
    began = time.perf_counter()
    session.close()
    taken = session.timings
    return {
        "written": written,
        "opened": taken.opened,
        "open_s": taken.open_s,
        "read": taken.read,
        "read_s": taken.read_s,
        "first_token_s": taken.first_token_s,
        "token_ms": None if taken.token_s is None else 1e3 * taken.token_s,
        "close_s": time.perf_counter() - began,
    }


def drop(entry: Entry) -> None:
    """Drops an entry's files from the page cache."""
    for file in entry.folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def reading(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A document of `--tokens` tokens, read and asked about."""
    tokens, new = given.tokens, given.new
    loaded = opened_model(tokens)
    document = encode(read_document(), loaded.tokenizer, tokens)[0].tolist()
    ids = [*document, *question(loaded)]
    began = time.perf_counter()
    store = ModelStore(Store(folder), loaded.model, "default", least=1)
    bound = time.perf_counter() - began
    # What a first pass sets up is not the document's.
    Session(loaded.model).read(document[:512])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("without", "keeping", "warm", "cold")}
    for round_ in range(given.rounds):
        for entry in store.store.entries():
            store.store.remove(entry)
        # In turns, so that a slower moment of the machine is not one side's alone.
        for name in ("without", "keeping") if round_ % 2 == 0 else ("keeping", "without"):
            session = Session(loaded.model, store=store if name == "keeping" else None)
            runs[name].append(asked(session, ids, tokens, new))
        [entry] = store.store.entries()
        for name in ("warm", "cold"):
            if name == "cold":
                drop(entry)
            runs[name].append(asked(Session(loaded.model, store=store), ids, tokens, new))
    same = [each["written"] == runs["without"][0]["written"] for kind in runs.values() for each in kind]
    for kind in runs.values():
        for each in kind:
            del each["written"]
    least = {name: {key: min(each[key] for each in kind) for key in kind[0]} for name, kind in runs.items()}
    return {
        "tokens": tokens,
        "rounds": given.rounds,
        "fingerprint_s": bound,
        "entry_bytes": entry.bytes,
        "same_tokens": all(same),
        **least,
        "reading_with_store_over_without": least["keeping"]["read_s"] / least["without"]["read_s"],
        "first_token_again_over_opened": least["without"]["first_token_s"] / least["warm"]["first_token_s"],
        "first_token_again_over_opened_cold": least["without"]["first_token_s"] / least["cold"]["first_token_s"],
    }


def questions(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same tokens with the store, each question in a session that has only what is on disk, and without."""
    tokens, new = min(given.tokens, 2048), given.new
    loaded = opened_model(tokens)
    store = ModelStore(Store(folder), loaded.model, "default", least=1)
    both = encode(read_document(), loaded.tokenizer, 2 * tokens)[0].tolist()
    asked_of, same, opened = 0, 0, 0
    for document in (both[:tokens], both[tokens:]):
        without = Session(loaded.model)
        first = Session(loaded.model, store=store)
        first.read(document)
        first.close()
        turns = list(document)
        for number, topic in enumerate(TOPICS):
            ids = [*document, *question(loaded, topic)]
            kept = Session(loaded.model, store=store)
            asked_of += 1
            with_store = asked(kept, ids, tokens, new)
            same += asked(without, ids, tokens, new)["written"] == with_store["written"]
            opened += with_store["opened"] >= tokens
            if number < 5:
                turns += question(loaded, topic)
                kept = Session(loaded.model, store=store)
                with_store = asked(kept, turns, tokens, new)
                kept.keep_answer()
                asked_of += 1
                opened += with_store["opened"] >= tokens
                same += asked(Session(loaded.model), turns, tokens, new)["written"] == with_store["written"]
                turns += with_store["written"]
    return {"tokens": tokens, "asked": asked_of, "opened": opened, "the_same": same}


def make_entry(tokens: int, folder: Path) -> None:
    """An entry with random rows."""
    loaded = opened_model(tokens)
    binding = ModelStore(Store(folder), loaded.model).binding
    session, chunk = Session(loaded.model), min(CHUNK, tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 1000, (tokens,), generator=generator).tolist()
    session.read(ids[:chunk])
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
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        data = {TOKEN_IDS: as_bytes(torch.tensor(ids[begin:end], dtype=torch.int32))}
        for name, storage in storages.items():
            part = storage[0, : end - begin]
            if name.endswith("index_scale"):
                part = part * (0.8 + 0.4 * torch.rand(part.shape, generator=generator))
            data[name] = as_bytes(part)
        for name, each in data.items():
            write_all(handle, each, layout.parts[name].place(begin))
        checks.append(check_of(end, data))
    os.fsync(handle)
    os.close(handle)
    publish(place, State(tokens), checks)


def ask_entry(tokens: int, folder: Path, new: int, dropped: bool) -> dict[str, Any]:
    """Opens the entry and asks about it, in this process."""
    loaded = opened_model(tokens)
    store = ModelStore(Store(folder), loaded.model, least=1)
    [entry] = store.store.entries()
    if dropped:
        drop(entry)
    Session(loaded.model).read(list(range(20, 532)))
    reset_peak_rss()
    before = rss_mb()
    ids = [*entry.token_ids().tolist(), *question(loaded)]
    session = Session(loaded.model, store=store)
    result = asked(session, ids, tokens, new)
    del result["written"]
    parts = entry.layout.parts
    dense = [name for name in parts if name.startswith("layers.0.") and name.endswith((".key", ".value"))]
    kv = sum(part.row_bytes for name, part in parts.items() if name.endswith((".key", ".value")))
    return {
        **result,
        "tokens": tokens,
        "entry_bytes": entry.bytes,
        "kv_bytes": tokens * kv,
        "dense_layer_kv_mb": tokens * sum(parts[name].row_bytes for name in dense) / 1e6,
        "peak_rss_mb": peak_rss_mb(),
        "rss_mb_before": before,
        "rss_mb": rss_mb(),
    }


def rss_mb() -> dict[str, float]:
    """Resident memory of this process by kind, MB."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status if line.startswith(("Rss", "VmRSS")))
    return {name: int(value.split()[0]) * 1024 / 1e6 for name, value in lines.items()}


def in_a_process(tokens: int, folder: Path, new: int, *, dropped: bool, group: Path | None = None) -> dict[str, Any]:
    """`ask_entry` in a process of its own, inside a control group where one is given."""
    command = [sys.executable, __file__, "--ask", str(folder), "--large", str(tokens), "--new", str(new)]
    command += ["--dropped"] if dropped else []
    command += ["--group", str(group)] if group is not None else []
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        return {"failed": finished.returncode, "said": finished.stderr[-500:]}
    return json.loads(finished.stdout.splitlines()[-1])


def large(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An entry of `--large` tokens, in the page cache and not."""
    make_entry(given.large, folder)
    kinds = (("from_page_cache", False), ("after_dropping_it", True))
    return {name: in_a_process(given.large, folder, given.new, dropped=dropped) for name, dropped in kinds}


def limited(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An entry larger than the memory that its process may take."""
    config = load_model("default").model.config
    a_token = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    tokens = int(given.limited_gb * 1e9 / a_token) // 256 * 256
    make_entry(tokens, folder)
    found = {"unlimited": in_a_process(tokens, folder, given.new, dropped=True)}
    with control_group(int(given.limit_gb * 1e9)) as group:
        if group is None:
            return {**found, "limited": None, "why": "no control group can be made here"}
        found["limited"] = in_a_process(tokens, folder, given.new, dropped=True, group=group)
    return {"limit_gb": given.limit_gb, **found}


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A control group within this process's own, with so many bytes of memory; `None` where none can be made."""
    lines = [line.strip().split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = [
        (CONTROL_GROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes")
        for _, kind, path in lines
        if kind == "memory"
    ]
    places += [(CONTROL_GROUPS / path.lstrip("/"), "memory.max") for number, _, path in lines if number == "0"]
    for place, name in places:
        group = place / f"dsa-store-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            # A group of another kind has no such file, or does not let it be written.
            with contextlib.suppress(OSError):
                if (group / name).exists():
                    (group / name).write_text(str(limit))
                    yield group
                    return
        finally:
            group.rmdir()
    yield None


def kv(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Keys and values kept narrower; the second half of the text counts."""
    tokens = min(given.tokens, 8192)
    found: dict[str, Any] = {"tokens": tokens}
    names = [name for name in KINDS for _ in range(given.rounds)]
    # There and back, so that a slower moment of the machine is not one side's alone.
    for name in names[:: given.rounds] + names[:: -given.rounds]:
        loaded = opened_model(tokens, kv_dtype=name)
        ids = encode(read_document(), loaded.tokenizer, tokens)
        result = read(loaded.model, ids, start=tokens // 2, new_tokens=given.new)
        store = Store(folder / name)
        if name not in found:
            session = Session(loaded.model, store=ModelStore(store, loaded.model, "default", least=1))
            session.read(ids[0, : min(tokens, CHUNK)].tolist())
            session.close()
        [entry] = store.entries()
        taken = {"read_s": result.prefill_s, "token_ms": 1e3 / (result.decode_tokens_per_s or float("inf"))}
        before = found.get(name, {})
        found[name] = {
            "perplexity": result.perplexity,
            "bytes_a_token": entry.layout.token_bytes,
            **{each: min(value, before.get(each, value)) for each, value in taken.items()},
        }
    for name in KINDS[1:]:
        for key in ("perplexity", "bytes_a_token", "read_s", "token_ms"):
            found[name][f"{key}_over_fp32"] = found[name][key] / found["fp32"][key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; by default all")
    parser.add_argument("--tokens", type=int, default=32768, help="of the document")
    parser.add_argument("--large", type=int, default=131072, help="tokens of the large entry")
    parser.add_argument("--limited-gb", type=float, default=12.0, help="keys and values of the entry under a limit")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="memory of that process")
    parser.add_argument("--new", type=int, default=24, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest of so many counts")
    parser.add_argument("--json", type=Path, help="the record to write")
    parser.add_argument("--folder", type=Path, help="where to keep; by default a temporary folder")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dropped", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask is not None:
        if given.group is not None:
            (given.group / "cgroup.procs").write_text(str(os.getpid()))
        print(json.dumps(ask_entry(given.large, given.ask, given.new, given.dropped)))
        return
    record: dict[str, Any] = {}
    if given.json is not None and given.json.exists():
        record = json.loads(given.json.read_text())
    measures = {"reading": reading, "questions": questions, "large": large, "limited": limited, "kv": kv}
    for name in given.only or PARTS:
        with tempfile.TemporaryDirectory(dir=given.folder) as made:
            environment = describe_machine(torch.device("cpu"))
            record[name] = {**measures[name](given, Path(made) / "store"), "environment": environment}
        print(json.dumps({name: record[name]}, indent=1), flush=True)
        if given.json is not None:
            write_json(given.json, record)


if __name__ == "__main__":
    main()
