"""Training data: text files or token ids become one stream, and the stream becomes windows.

Documents follow each other in the order given, each with the tokens that the tokenizer adds by itself and its
end-of-text token behind it. Windows are cut out of that stream, so one may hold the end of a document and the start
of the next; with documents longer than a window most hold one. Which window a step reads is a pure function of the
seed and the step, so a resumed run needs no random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dsa.text import read_text
from dsa.train.files import write_atomically

MIN_TOKENS = 2
TOKENS_KEY = "input_ids"
TOKENS_FORMAT = "dsa-tokens"
NARROW_VOCABULARY = 1 << 16

Status = Callable[[str], None]


@dataclass(frozen=True)
class TokenStream:
    """All training tokens, one after the other.

    Args:
        ids: int32 `[n]` on the CPU.
        fingerprint: SHA-256 of `ids`, little-endian: tells whether a resumed run reads the same data.
    """

    ids: torch.Tensor
    fingerprint: str

    @classmethod
    def of(cls, ids: torch.Tensor) -> TokenStream:
        """Takes integers `[n]` of any width."""
        narrow = ids.to(torch.int32).contiguous()
        return cls(narrow, hashlib.sha256(narrow.numpy().astype("<i4", copy=False).tobytes()).hexdigest())

    def __len__(self) -> int:
        return self.ids.numel()


def read_data(
    paths: Sequence[str | Path], tokenizer: Any, vocabulary: int, status: Status | None = None
) -> TokenStream:
    """Reads the training data.

    Args:
        paths: UTF-8 text files, one document each, or `.safetensors` files written by `write_tokens`.
        tokenizer: Tokenises the text files; not needed for token files.
        vocabulary: Size of the model's vocabulary; every token id must be smaller.
        status: Told which file is being read.

    Raises:
        OSError: A file is missing, a directory, or cannot be read.
        ValueError: No file was given, or one is empty, binary, not UTF-8, too short, not a token file, or made
            for a larger vocabulary.
    """
    if not paths:
        raise ValueError("data: no file was given; expected UTF-8 text files or token files (.safetensors)")
    parts = []
    for path in map(Path, paths):
        if status is not None:
            status(f"Reading {path.name}")
        _check_file(path)
        ids = _read_tokens(path) if path.suffix == ".safetensors" else _tokenize(path, tokenizer)
        if len(ids) < MIN_TOKENS:
            raise ValueError(f"data: {path} has {len(ids)} token(s); at least {MIN_TOKENS} are needed")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"data: {path} has token ids from {low} to {high}, the model's vocabulary ends at "
                f"{vocabulary - 1}; tokenise it with this model's tokenizer"
            )
        parts.append(ids)
    return TokenStream.of(torch.cat(parts))


def write_tokens(path: str | Path, stream: TokenStream) -> Path:
    """Writes token ids for a machine that has neither the text nor the tokenizer.

    The file is a safetensors with one tensor, `input_ids` `[n]`: uint16 where the ids fit, else int32.

    Raises:
        ValueError: The name does not end in `.safetensors`.
        OSError: It cannot be written; nothing is left behind.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"tokens are written as .safetensors, got {file.name}")
    fits = int(stream.ids.max()) < NARROW_VOCABULARY
    ids = stream.ids.to(torch.uint16) if fits else stream.ids
    write_atomically(file, save({TOKENS_KEY: ids}, metadata={"format": TOKENS_FORMAT, "version": "1"}))
    return file


class Windows:
    """Which stretch of the stream each step reads.

    An epoch cuts the stream into windows from a random offset on and reads them in a random order; the next epoch
    takes another offset and another order. Offset and order depend on the seed and the number of the epoch only.

    Args:
        stream: The tokens.
        seq_len: Tokens per window.
        seed: Of offsets and orders.

    Raises:
        ValueError: The stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        if len(stream) < seq_len:
            raise ValueError(
                f"data: {len(stream):,} tokens in all are less than one sequence of seq_len={seq_len:,}; "
                "give more text or a smaller seq_len"
            )
        self.stream = stream
        self.seq_len = seq_len
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __call__(self, step: int) -> torch.Tensor:
        """Token ids int64 `[1, seq_len]` that the step (from 0) reads."""
        epoch, first = 0, 0
        starts = self._epoch(epoch)
        # The number of windows depends on the epoch's offset, so epochs are counted one by one.
        while step >= first + len(starts):
            first += len(starts)
            epoch += 1
            starts = self._epoch(epoch)
        start = int(starts[step - first])
        return self.stream.ids[start : start + self.seq_len].long().unsqueeze(0)

    def _make_epoch(self, epoch: int) -> torch.Tensor:
        generator = seeded(self.seed, epoch)
        slack = min(self.seq_len, len(self.stream) - self.seq_len + 1)
        offset = int(torch.randint(slack, (), generator=generator))
        count = (len(self.stream) - offset) // self.seq_len
        return offset + self.seq_len * torch.randperm(count, generator=generator)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose state depends on all the numbers."""
    text = ",".join(map(str, numbers)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file {path}; expected UTF-8 text or a token file")
    if path.is_dir():
        raise IsADirectoryError(f"data: {path} is a directory; name the text files in it, e.g. {path}/*.txt")


def _tokenize(path: Path, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(read_text(path, "data"), verbose=False)["input_ids"]
    if len(ids) >= MIN_TOKENS and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int32)


def _read_tokens(path: Path) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as opened:
            names = sorted(opened.keys())
            if TOKENS_KEY not in names:
                raise ValueError(
                    f"data: {path} has no tensor {TOKENS_KEY!r} (it has {', '.join(names[:3]) or 'none'}); expected a "
                    "token file as scripts/tokenize_text.py writes it"
                )
            ids = opened.get_tensor(TOKENS_KEY)
    except SafetensorError as error:
        raise ValueError(f"data: {path} is truncated or not a safetensors file ({error})") from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"data: {TOKENS_KEY} in {path} must be integers [n], got {ids.dtype} {list(ids.shape)}; flatten it"
        )
    return ids.to(torch.int32)
