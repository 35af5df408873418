"""What a trained model's indexer selects over a long text, for the whole-path row of `python -m benchmarks.gpu`.

    python benchmarks/gpu/record_selections.py --out selections.safetensors [--tokens 131072] [--top-k 2048]

The index tensors are those that `dsa bench --data recorded` uses: a middle layer of the default model reading the
Python language reference, recorded once and kept. The file holds `selection`, int32 `[T, K]`: the positions that each
token's query reads, ascending, padded at the end with -1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsa.bench.recording import recording
from dsa.models.default_model import DEFAULT_MODEL
from dsa.ops import index_topk
from dsa.runs.progress import silent

QUERIES = 4096
"""Selected at once."""


def selections(tokens: int, top_k: int) -> tuple[torch.Tensor, str]:
    """int32 `[T, K]`, and what it came from."""
    found = recording(DEFAULT_MODEL, tokens, top_k=top_k, status=print, progress=silent)
    tensors, sizes = found.tensors, found.sizes
    keys = tensors.index_key[:, :tokens]
    parts = []
    for begin in range(0, tokens, QUERIES):
        end = min(begin + QUERIES, tokens)
        query, weight = tensors.index_query[:, begin:end], tensors.index_weight[:, begin:end]
        parts.append(index_topk(query, keys[:, :end], weight, top_k, sinks=sizes.sinks, local=sizes.local)[0])
    return torch.cat(parts), found.source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--top-k", type=int, default=2048)
    given = parser.parse_args()
    found, source = selections(given.tokens, given.top_k)
    save_file({"selection": found.contiguous()}, given.out)
    print(f"{given.out}: {found.shape[0]:,} queries, K {found.shape[1]:,}, {source}")


if __name__ == "__main__":
    main()
