"""llama.cpp reads a prompt and decodes, in a process and an interpreter of its own; imports nothing of dsa.

Reads JSON on the standard input: `gguf`, `tokens`, `check` (how many of the tokens the check reads), `decode` (how
many to decode), `threads`, `flash`. Writes one line of JSON: seconds, and the most likely token after the check.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np


def main() -> None:
    asked = json.load(sys.stdin)
    tokens = asked["tokens"]
    model = llama_cpp.Llama(
        asked["gguf"],
        n_ctx=len(tokens) + asked["decode"] + 8,
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        flash_attn=asked["flash"],
        verbose=False,
    )
    model.eval(tokens[: asked["check"]])
    after_check = most_likely(model)
    model.reset()
    began = time.perf_counter()
    model.eval(tokens)
    token = most_likely(model)
    prefill = time.perf_counter() - began
    decoded = []
    for _ in range(asked["decode"]):
        began = time.perf_counter()
        model.eval([token])
        token = most_likely(model)
        decoded.append(time.perf_counter() - began)
    system = llama_cpp.llama_print_system_info().decode()
    print(
        json.dumps(
            {
                "prefill_s": prefill,
                "decode_s": decoded,
                "after_check": after_check,
                "version": llama_cpp.__version__,
                "system": " ".join(system.split()),
            }
        )
    )


def most_likely(model: llama_cpp.Llama) -> int:
    """The token with the highest logit after the last one read."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())


if __name__ == "__main__":
    main()
