"""llama.cpp with the default model's own GGUF file, compared with the attached model on the same prompt.

It runs in a process of its own, and may live in an environment of its own: both bring their threads and their OpenMP.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsa.bench import end_to_end
from dsa.bench.measure import Disagreement, Timing, in_turn, ratio
from dsa.bench.pair import Pair, load_pair
from dsa.bench.recording import long_ids
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.models.default_model import DEFAULT_MODEL, Status, default_gguf
from dsa.runs.progress import Progress

INSTALL = (
    "pip install 'dsa-attention[llamacpp]', or in an environment of its own, whose interpreter --llama-python names"
)
CHECK_TOKENS = 256
AMONG_FIRST = 5


def missing(python: str | None) -> str | None:
    """Why llama.cpp cannot be measured with this interpreter, or `None`.

    Raises:
        ValueError: The user named an interpreter that does not have it.
    """
    try:
        finished = subprocess.run(
            [python or sys.executable, "-c", "import llama_cpp"], capture_output=True, text=True, check=False
        )
        reason = None if finished.returncode == 0 else (finished.stderr.strip().splitlines() or ["it failed"])[-1]
    except OSError as error:
        reason = str(error)
    if reason is not None and python is not None:
        raise ValueError(
            f"llama-python: {python} cannot import llama_cpp ({reason}); pip install llama-cpp-python there"
        )
    return reason


def llamacpp(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A row per length: llama.cpp with and without flash attention, and the attached model."""
    skipped = missing(settings.llama_python)
    if settings.model != DEFAULT_MODEL:
        skipped = "the model is not the default one, whose GGUF file both could read"
    if skipped is not None:
        row = Row("llamacpp", "", {}, notes=[f"Skipped: {skipped}. To measure it: {INSTALL}."])
        yield row
        return
    pair = load_pair(settings, status)
    for tokens in settings.lengths_or(end_to_end.PROMPT_LENGTHS, (96,)):
        yield _row(tokens, pair, settings, progress)


def _row(tokens: int, pair: Pair, settings: Settings, progress: Progress) -> Row:
    ids = long_ids(pair.plain.tokenizer, tokens)
    decoded = 2 if settings.quick else end_to_end.DECODED
    model = pair.sparse.model
    with progress(f"DSA: prompt of {tokens:,}", 1) as advance:
        seconds, cache, token = end_to_end.read_prompt(model, ids)
        # The first token meets cold code.
        decoder = end_to_end.Decoder(model, cache, token)
        own = in_turn({"DSA token": decoder}, budget=settings.budget, least=decoded, most=decoded)
        advance()
    timings = {"DSA prefill": Timing((seconds,)), **own}
    del decoder, cache
    checked = min(CHECK_TOKENS, tokens)
    logits = pair.plain.model(ids[:, :checked], logits_to_keep=1).logits[0, -1]
    likely = logits.topk(AMONG_FIRST).indices.tolist()
    versions = {}
    for flash in (True, False):
        name = f"llama.cpp, flash {'on' if flash else 'off'}"
        with progress(f"{name}: prompt of {tokens:,}", 1) as advance:
            found = _ask(ids, checked, decoded, flash, settings.llama_python)
            advance()
        if found["after_check"] not in likely:
            raise Disagreement(
                f"{name} continues {checked} tokens with what is not among the model's first {AMONG_FIRST}"
            )
        timings[f"{name}, prefill"] = Timing((found["prefill_s"],))
        timings[f"{name}, token"] = Timing(tuple(found["decode_s"]))
        versions = {"llama_cpp_python": found["version"], "llama_cpp_system": found["system"]}
    row = Row("llamacpp", f"n = {tokens:,}", {"tokens": tokens, **pair.shape, **versions}, timings)
    row.length = tokens
    row.checks = [*pair.checks, f"llama.cpp continues {checked} tokens with one of the model's first {AMONG_FIRST}"]
    for part, own_name in (("prefill", "DSA prefill"), ("token", "DSA token")):
        peers = [timing for name, timing in timings.items() if name.startswith("llama") and name.endswith(part)]
        best = min(peers, key=lambda timing: timing.median)
        what = "prefill" if part == "prefill" else "decode"
        row.figures.append(ratio(f"{what}, llama.cpp / DSA", best, timings[own_name]))
    row.notes = [
        f"The same GGUF file, {torch.get_num_threads()} thread(s): Q4 weights and an fp16 cache in llama.cpp, which it "
        "dequantises as it goes; fp32 here. The better of flash attention on and off counts."
    ]
    return row


def _ask(ids: torch.Tensor, checked: int, decoded: int, flash: bool, python: str | None) -> dict[str, Any]:
    asked = {
        "gguf": str(default_gguf()),
        "tokens": ids[0].tolist(),
        "check": checked,
        "decode": decoded,
        "threads": torch.get_num_threads(),
        "flash": flash,
    }
    finished = subprocess.run(
        [python or sys.executable, str(Path(__file__).with_name("llamacpp_worker.py"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"llama.cpp failed: {last}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found
