#!/usr/bin/env python3
"""Tokenises text files into one .safetensors that `dsa train --data` reads on a machine without the text.

    python scripts/tokenize_text.py default text/train/*.txt --out tokens.safetensors

The file holds one tensor, `input_ids` [n]: documents in the order given, each followed by the tokenizer's end-of-text
token; uint16 where the ids fit, else int32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or directory whose tokenizer is used, or `default`")
    parser.add_argument("files", nargs="+", help="UTF-8 text files, one document each")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    given = parser.parse_args()

    from transformers import AutoTokenizer

    from dsa.models.default_model import default_model_dir
    from dsa.train.data import read_data, write_tokens

    def say(message: str) -> None:
        print(message, file=sys.stderr)

    try:
        source = default_model_dir(say) if given.model == "default" else given.model
        tokenizer = AutoTokenizer.from_pretrained(source)
        stream = read_data(given.files, tokenizer, len(tokenizer), say)
        written = write_tokens(given.out, stream)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(stream):,} tokens in {written}, SHA-256 of the ids {stream.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
