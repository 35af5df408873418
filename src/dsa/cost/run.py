"""What one run took, next to dense attention: a document read, an answer written, counted for exactly these lengths.

Arithmetic, by the conventions of `dsa.cost.work`; nothing here is measured. The first token of the answer comes out of
reading the prompt, each further one is a forward of its own.
"""

from __future__ import annotations

from typing import Any

from dsa.config import DSAConfig
from dsa.cost.attention import kind_of, mean_read, mean_scanned
from dsa.cost.shape import ModelShape
from dsa.cost.work import Parts, Storage, decode_work, memory, prefill_work, total

OF_ATTENTION = ("attention", "indexer_projections", "index_scan")
"""Parts that DSA changes; the others cost the same."""


def run_cost(
    shape: ModelShape, config: DSAConfig, read: int, written: int, storage: Storage | None = None
) -> dict[str, Any]:
    """Pairs, multiply-adds and bytes with DSA and dense, as plain JSON types.

    Args:
        shape: The model.
        config: Its DSA.
        read: Tokens of the prompt.
        written: Tokens of the answer.
        storage: Bytes of a number.

    Returns:
        `dsa` and `dense`, each with `attention_pairs` and `index_pairs` of the prompt (of one head, summed over
        layers), `prompt_multiply_adds` and those `_of_attention` with the indexer's, the same and `token_bytes` for a
        mean token of the answer where more than one was written, `keys_and_values` and `index_keys` in bytes.

    Raises:
        ValueError: A count below 1.
    """
    if written < 1:
        raise ValueError(f"written must be at least 1, got {written}")
    return {
        "tokens_read": read,
        "tokens_written": written,
        "dsa": _one(shape, config, read, written, storage),
        "dense": _one(shape, None, read, written, storage),
    }


def _one(
    shape: ModelShape, config: DSAConfig | None, read: int, written: int, storage: Storage | None
) -> dict[str, float]:
    attention_pairs = index_pairs = 0.0
    for number, layer in enumerate(shape.layers):
        kind, top_k = ("dense", layer.window) if layer.window is not None else kind_of(config, number)
        attention_pairs += read * mean_read(1, read, top_k)
        if kind == "sparse" and top_k is not None:
            index_pairs += read * mean_scanned(1, read, top_k)
    prompt = prefill_work(shape, config, read, storage)
    # Of the last token no keys are stored: nothing was read after it.
    held = memory(shape, config, read + written - 1, storage)
    found = {
        "attention_pairs": round(attention_pairs),
        "index_pairs": round(index_pairs),
        "prompt_multiply_adds": total(prompt).multiply_adds,
        "prompt_multiply_adds_of_attention": _of_attention(prompt),
        "keys_and_values": held.keys_and_values,
        "index_keys": held.index_keys,
    }
    later = written - 1
    if later:
        work = decode_work(shape, config, read + 1, read + later, storage)
        found["token_multiply_adds"] = total(work).multiply_adds / later
        found["token_multiply_adds_of_attention"] = _of_attention(work) / later
        found["token_bytes"] = total(work).bytes / later
    return found


def _of_attention(parts: Parts) -> float:
    return sum(parts[part].multiply_adds for part in OF_ATTENTION)
