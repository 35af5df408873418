#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer on text files, for a model that begins with random weights.

    python scripts/train_tokenizer.py text/train/*.txt --vocabulary 2048 --out configs/small

Writes what `AutoTokenizer.from_pretrained` reads; with a `config.json` next to it the folder is a MODEL for
`dsa train --stage dense --from-scratch`. Any text can be read, since every byte is a token; token 0 ends a text. The
same files give the same tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BYTES = 256


def train_tokenizer(files: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with exactly so many tokens, those of the 256 bytes and the end of text among them.

    Raises:
        ValueError: The vocabulary has no room for those, or the text is too short for so many tokens.
        OSError: A file cannot be read.
    """
    if vocabulary <= BYTES:
        raise ValueError(f"vocabulary must be more than {BYTES}, one token for every byte; got {vocabulary}")
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}; expected UTF-8 text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(files, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, {vocabulary} were asked for; give more text or a "
            "smaller --vocabulary"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="UTF-8 text files")
    parser.add_argument("--vocabulary", type=int, default=2048, metavar="N", help="tokens in all (default: 2048)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    given = parser.parse_args()
    try:
        train_tokenizer(given.files, given.vocabulary).save_pretrained(given.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.vocabulary} tokens in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
