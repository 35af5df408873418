"""Cost over length, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsa.config import DSAConfig
from dsa.cost.report import crossings, variants_of
from dsa.cost.shape import ModelShape
from dsa.cost.work import Storage, decode_work, memory, prefill_work, total

NAMES = {"dense": "dense", "dsa": "DSA", "shared": "DSA, shared selections"}


def lengths_for(tokens: int) -> list[int]:
    """Four a doubling, from 1,024 (or an eighth of a shorter text) to the text's own length, and that itself."""
    first = max(1, min(1024, tokens // 8))
    found, length = [], float(first)
    while length < tokens:
        found.append(round(length))
        length *= 2**0.25
    return sorted({*found, tokens})


def draw_costs(shape: ModelShape, config: DSAConfig, tokens: int, path: Path, storage: Storage | None = None) -> None:
    """Draws four panels: a decoded token's multiply-adds and bytes, a prompt's multiply-adds, the caches.

    A dotted line marks the length from which on DSA needs less.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    storage = storage or Storage()
    lengths = lengths_for(tokens)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), dpi=150)
    token_ops, token_bytes, prompt_ops, caches = axes.ravel()
    for number, (name, each) in enumerate(variants_of(config).items()):
        style: dict[str, Any] = {"label": NAMES[name], "color": f"C{number}"}
        tokens_work = [total(decode_work(shape, each, length, length, storage)) for length in lengths]
        prompts = [total(prefill_work(shape, each, length, storage)) for length in lengths]
        held = [memory(shape, each, length, storage) for length in lengths]
        token_ops.plot(lengths, [work.multiply_adds for work in tokens_work], **style)
        token_bytes.plot(lengths, [work.bytes for work in tokens_work], **style)
        prompt_ops.plot(lengths, [work.multiply_adds for work in prompts], **style)
        caches.plot(lengths, [each.keys_and_values + each.index_keys for each in held], **style)
        if each is not None:
            found = crossings(shape, each, storage)
            for place, key in (
                (token_ops, "token_multiply_adds"),
                (token_bytes, "token_bytes"),
                (prompt_ops, "prompt_multiply_adds"),
            ):
                point = found[key]
                if point is not None and lengths[0] <= point <= lengths[-1]:
                    place.axvline(point, color=f"C{number}", linestyle=":", linewidth=1)
    titles = (
        "multiply-adds of a decoded token",
        "bytes of a decoded token",
        "multiply-adds of a prompt",
        "cache, bytes",
    )
    for place, title in zip(axes.ravel(), titles, strict=True):
        place.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        place.grid(which="major", alpha=0.3)
    token_ops.legend(frameon=False)
    figure.suptitle(f"{shape.name}, K = {config.top_k:,} (dotted: from here on DSA needs less)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
