#!/usr/bin/env python3
"""Writes training tokens in which half of the text repeats, word for word, something that came before it.

    python scripts/repeat_text.py tokens.safetensors --tokens 300000 --out repeated.safetensors

Some heads of a language model read, far away, what followed the last time the present words occurred. Ordinary text
gives them little to do, so indexers trained on it alone miss what those heads read, and texts that repeat themselves
(references, code, contracts) suffer. Here passages of the input alternate with copies of passages at
least 300 tokens earlier in the output.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from dsa.train.data import TokenStream, read_data, write_tokens

PASSAGE = (64, 512)
COPY = (32, 384)
NEAREST = 300


def repeat(tokens: torch.Tensor, length: int, furthest: int, seed: int) -> torch.Tensor:
    """`length` tokens: passages of `tokens`, each behind a copy of something earlier.

    Args:
        tokens: The text, int64 `[n]`.
        length: Tokens to write.
        furthest: How far back a copy may begin.
        seed: Of the places and lengths. A new document is begun every 8,192 tokens.
    """
    chance = random.Random(seed)
    out: list[int] = []
    source, document = 0, -1
    while len(out) < length:
        if len(out) // 8192 > document:
            document = len(out) // 8192
            source = chance.randrange(len(tokens) - 8192)
        size = chance.randint(*PASSAGE)
        out.extend(tokens[source : source + size].tolist())
        source += size
        size = chance.randint(*COPY)
        nearest, reach = NEAREST + size, min(len(out), furthest)
        if reach > nearest:
            begin = len(out) - chance.randint(nearest, reach)
            out.extend(out[begin : begin + size])
    return torch.tensor(out[:length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="a file that tokenize_text.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", dest="length", type=int, default=300_000, help="how many to write")
    parser.add_argument("--furthest", type=int, default=7500, help="tokens that a copy reaches back at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    stream = read_data([given.tokens], None, 1 << 16)
    repeated = repeat(stream.ids, given.length, given.furthest, given.seed)
    print(write_tokens(given.out, TokenStream.of(repeated)))


if __name__ == "__main__":
    main()
