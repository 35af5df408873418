"""Prefill of a long text by the attached default model on the reference path: seconds and peak memory.

    python benchmarks/e2e/prefill_reference.py [--tokens 32768] [--dense] [--json FILE]

Last logits only, cache filled, as `generate` begins. Before anything is timed, the sparse path must agree with
dense attention on a short text where it selects everything. `--dense` also times the plain model with SDPA.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dsa import detach, ops
from dsa.cli.console import Steps, notes
from dsa.eval.documents import encode, read_document
from dsa.eval.machine import describe_machine, peak_rss_mb, reset_peak_rss
from dsa.eval.output import check_writable, write_json
from dsa.eval.progress import Progress, layer_progress
from dsa.models.loading import LoadedModel, attach_indexers, load_model

RESULTS = Path(__file__).resolve().parents[1] / "results"
CHECK_TOKENS = 512
AGREEMENT = 1e-3


def check_agreement(loaded: LoadedModel, indexers: str | None, ids: torch.Tensor) -> float:
    """Largest logit difference between dense attention and the sparse path when it selects every token.

    Raises:
        SystemExit: It is above `AGREEMENT`: there is nothing to time.
    """
    model, short = loaded.model, ids[:, :CHECK_TOKENS]
    expected = model(short).logits
    attach_indexers(loaded, indexers, top_k=CHECK_TOKENS, dense_shortcut=False)
    difference = float((model(short).logits - expected).abs().max())
    detach(model)
    if not difference <= AGREEMENT:
        raise SystemExit(f"the sparse path differs from dense attention by {difference}: nothing is measured")
    return difference


def check_path() -> None:
    """Makes sure that it is the reference that will run.

    Raises:
        SystemExit: Another implementation would be chosen.
    """
    query, key = torch.ones(1, 1, 9, 64), torch.ones(1, 1, 3, 64)
    first = torch.zeros(1, 1, 1, dtype=torch.int32)
    for name in ("native", "triton", "vendor"):
        try:
            ops.sparse_attention(query, key, key, first, impl=name)
        except NotImplementedError:
            continue
        raise SystemExit(f"the implementation {name!r} runs here and would be measured in place of the reference")


def prefill(model: Any, ids: torch.Tensor, label: str, progress: Progress) -> dict[str, float]:
    """Seconds and peak memory of one prefill."""
    reset_peak_rss()
    with layer_progress(model, label, progress):
        began = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - began
    return {"prefill_s": seconds, "tokens_per_s": ids.shape[1] / seconds, "peak_rss_mb": peak_rss_mb()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--indexers", help="a file or a folder; by default the model's own")
    parser.add_argument("--dense", action="store_true", help="time the plain model with SDPA as well")
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/DATE-prefill-reference.json")
    arguments = parser.parse_args()
    now = datetime.now(UTC)
    out = check_writable(arguments.json or RESULTS / f"{now:%Y-%m-%d}-prefill-reference.json")
    check_path()
    with notes(), Steps() as steps:
        loaded = load_model(arguments.model, device="cpu", status=steps.status)
        ids = encode(read_document(), loaded.tokenizer, arguments.tokens)
        steps.status("Checking that dense and sparse agree")
        difference = check_agreement(loaded, arguments.indexers, ids)
        report, source = attach_indexers(loaded, arguments.indexers, top_k=arguments.top_k)
        result = {"dsa": prefill(loaded.model, ids, f"DSA prefill of {arguments.tokens:,} tokens", steps)}
        if arguments.dense:
            detach(loaded.model)
            result["dense"] = prefill(loaded.model, ids, f"Dense prefill of {arguments.tokens:,} tokens", steps)
    config = loaded.model.config
    figures = {
        "benchmark": "prefill, last logits only, cache filled, reference path",
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "model": arguments.model,
        "tokens": arguments.tokens,
        "indexers": source,
        "config": report.config.to_dict(),
        "shapes": {
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "dtype": str(loaded.model.dtype),
        },
        "largest_logit_difference": difference,
        **result,
        "environment": describe_machine(),
    }
    write_json(out, figures)
    for name, measured in result.items():
        print(f"{name}: {measured['prefill_s']:.0f} s, peak RSS {measured['peak_rss_mb']:,.0f} MB")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
