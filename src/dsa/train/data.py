"""Training data: documents become one stream of tokens, and the stream becomes windows.

Documents follow each other in the order given, each with the tokens that the tokenizer adds by itself and its
end-of-text token after it. Windows are cut out of that stream, so one may hold the end of a document and the start
of the next: the stream knows where documents begin, and tokens attend within their own document only. Which window
a step reads is a pure function of the seed and the step, so a resumed run needs no random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from dsa.documents.tokens import TextEncoder
from dsa.runs.files import write_tensors
from dsa.train.sources import DEFAULT_COLUMN, documents, is_remote

MIN_TOKENS = 2
TOKENS_KEY = "input_ids"
STARTS_KEY = "document_starts"
TOKENS_FORMAT = "dsa-tokens"
NARROW_VOCABULARY = 1 << 16
DOCUMENTS_AT_ONCE = 64

Status = Callable[[str], None]


@dataclass(frozen=True)
class TokenStream:
    """All training tokens, one document after the other.

    Args:
        ids: int32 `[n]` on the CPU.
        starts: Where documents begin, int64, ascending, the first 0.
        fingerprint: SHA-256 of both, little-endian: tells whether a resumed run reads the same data.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    fingerprint: str

    @classmethod
    def of(cls, ids: torch.Tensor, starts: torch.Tensor | None = None) -> TokenStream:
        """Takes integers `[n]` of any width, and where documents begin; without, all is one document."""
        narrow = ids.to(torch.int32).contiguous()
        places = torch.zeros(1, dtype=torch.int64) if starts is None else starts.to(torch.int64).contiguous()
        digest = hashlib.sha256(narrow.numpy().astype("<i4", copy=False).tobytes())
        if len(places) > 1:
            digest.update(places.numpy().astype("<i8", copy=False).tobytes())
        return cls(narrow, places, digest.hexdigest())

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document."""
        ends = torch.cat((self.starts[1:], torch.tensor([len(self)])))
        return int((ends - self.starts).max())


def read_data(
    sources: Sequence[str | Path],
    tokenizer: Any,
    vocabulary: int,
    status: Status | None = None,
    *,
    column: str = DEFAULT_COLUMN,
    max_tokens: int | None = None,
    remote_tokens: int | None = None,
) -> TokenStream:
    """Reads the training data.

    Args:
        sources: What `dsa.train.sources.documents` takes, and `.safetensors` files written by `write_tokens`.
        tokenizer: Tokenises text; not needed for token files.
        vocabulary: Size of the model's vocabulary; every token id must be smaller.
        status: Called with the source that is being read.
        column: Column of JSON lines, parquet files and Hub datasets that holds the text.
        max_tokens: Stop reading after the document that reaches so many.
        remote_tokens: The same for each Hub dataset alone, where `max_tokens` does not say it: these can be
            larger than any disk.

    Raises:
        OSError: A file is missing, a directory, or cannot be read.
        ValueError: No source was given, or one is empty, binary, not UTF-8, without that column, too short, not a
            token file, or made for a larger vocabulary.
        ImportError: A format needs the package `datasets`.
    """
    if not sources:
        raise ValueError(
            "data: no file was given; expected UTF-8 text, .jsonl or .parquet files, token files (.safetensors) or "
            "hub:OWNER/NAME"
        )
    parts: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    total = 0
    for source in map(str, sources):
        if max_tokens is not None and total >= max_tokens:
            break
        check_file(source)
        if status is not None:
            status(f"Reading {source if is_remote(source) else Path(source).name}")
        left = None if max_tokens is None else max_tokens - total
        if left is None and is_remote(source):
            left = remote_tokens
        ids, begins = _read_source(source, tokenizer, column, left)
        if len(ids) < MIN_TOKENS:
            raise ValueError(f"data: {source} has {len(ids)} token(s); at least {MIN_TOKENS} are needed")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"data: {source} has token ids from {low} to {high}, the model's vocabulary ends at "
                f"{vocabulary - 1}; tokenise it with this model's tokenizer"
            )
        parts.append(ids)
        starts.append(begins + total)
        total += len(ids)
    return TokenStream.of(torch.cat(parts), torch.cat(starts))


def write_tokens(path: str | Path, stream: TokenStream) -> Path:
    """Writes token ids for a machine that has neither the text nor the tokenizer.

    The file is a safetensors: `input_ids` `[n]`, uint16 where the ids fit, else int32; and `document_starts`, int64.

    Raises:
        ValueError: The name does not end in `.safetensors`.
        OSError: It cannot be written; nothing is left of it.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"tokens are written as .safetensors, got {file.name}")
    fits = int(stream.ids.max()) < NARROW_VOCABULARY
    ids = stream.ids.to(torch.uint16) if fits else stream.ids
    tensors = {TOKENS_KEY: ids, STARTS_KEY: stream.starts}
    write_tensors(file, tensors, {"format": TOKENS_FORMAT, "version": "1"})
    return file


class Window(NamedTuple):
    """What a step reads of one or several sequences.

    Args:
        ids: int64 `[B, L]`.
        positions: int64 `[B, L]`, of each token in its document as far as the window shows it; `None` where each
            sequence is a part of one document.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None

    def eligible(self, sequence: int, first: int) -> torch.Tensor:
        """The tokens of a sequence with at least `first` tokens of their document before them, int64, ascending."""
        if self.positions is None:
            return torch.arange(first, self.ids.shape[1])
        return (self.positions[sequence] >= first).nonzero().flatten()


class Windows:
    """Which stretches of the stream are read, by number.

    An epoch cuts the stream into windows from a random offset on and reads them in a random order; the next epoch
    takes another offset and another order. Offset and order depend on the seed and the number of the epoch only.

    Args:
        stream: The tokens.
        seq_len: Tokens per window.
        seed: Of offsets and orders.
        boundaries: Whether tokens stay within their document; otherwise a window is one text.
        first: With boundaries, windows without enough tokens that have `first` others of their document before
            them are left out.
        at_least: How many such tokens are enough.

    Raises:
        ValueError: The stream is shorter than one window, or no window has enough of those tokens.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        seed: int,
        *,
        boundaries: bool = True,
        first: int = 0,
        at_least: int = 1,
    ) -> None:
        if len(stream) < seq_len:
            raise ValueError(
                f"data: {len(stream):,} tokens in all are less than one sequence of seq_len={seq_len:,}; "
                "give more text or a smaller seq_len"
            )
        self.stream = stream
        self.seq_len = seq_len
        self.seed = seed
        self.boundaries = boundaries
        self.first = first
        self.at_least = at_least
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        if not any(len(self._epoch(epoch)) for epoch in range(TRIED_EPOCHS)):
            raise ValueError(
                f"data: no window of {seq_len:,} tokens has {at_least} tokens with {first} others of their document "
                f"before them (the longest document has {stream.longest_document:,}); give longer documents, a smaller "
                "local window, or take the text as one document with --no-boundaries (boundaries=False)"
            )

    def __call__(self, number: int, count: int = 1) -> Window:
        """The windows `number` to `number + count - 1`, from 0, as one batch."""
        starts = [self._start(each) for each in range(number, number + count)]
        ids = torch.stack([self.stream.ids[start : start + self.seq_len].long() for start in starts])
        positions = torch.stack([self._positions(start) for start in starts])
        whole = bool((positions == torch.arange(self.seq_len)).all())
        return Window(ids, None if whole else positions)

    def _start(self, number: int) -> int:
        epoch, first = 0, 0
        starts = self._epoch(epoch)
        # The number of windows depends on the epoch's offset, so epochs are counted one by one.
        while number >= first + len(starts):
            first += len(starts)
            epoch += 1
            starts = self._epoch(epoch)
        return int(starts[number - first])

    def _positions(self, start: int) -> torch.Tensor:
        """Position of each token of a window since its document's start, or the window's, int64 `[seq_len]`."""
        places = torch.arange(self.seq_len)
        if not self.boundaries:
            return places
        inside = self._begins(start)
        begins = torch.cat((torch.zeros(1, dtype=torch.int64), inside))
        return places - begins[torch.searchsorted(inside, places, right=True)]

    def _begins(self, start: int) -> torch.Tensor:
        """Where documents begin after the first token of a window, counted from it."""
        low, high = torch.searchsorted(self.stream.starts, torch.tensor([start + 1, start + self.seq_len])).tolist()
        return self.stream.starts[low:high] - start

    def _teaches(self, start: int) -> bool:
        edges = [0, *self._begins(start).tolist(), self.seq_len]
        return sum(max(0, end - begin - self.first) for begin, end in pairwise(edges)) >= self.at_least

    def _make_epoch(self, epoch: int) -> torch.Tensor:
        generator = seeded(self.seed, epoch)
        slack = min(self.seq_len, len(self.stream) - self.seq_len + 1)
        offset = int(torch.randint(slack, (), generator=generator))
        count = (len(self.stream) - offset) // self.seq_len
        starts = offset + self.seq_len * torch.randperm(count, generator=generator)
        if not self.boundaries or len(self.stream.starts) == 1:
            return starts
        kept = [start for start in starts.tolist() if self._teaches(start)]
        return torch.tensor(kept, dtype=torch.int64)


TRIED_EPOCHS = 8
"""Epochs, each with another offset, that are looked through before no window is said to be long enough."""


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose state depends on all the numbers."""
    text = ",".join(map(str, numbers)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


def check_file(source: str, argument: str = "data") -> None:
    """Whether there is such a file. Raises `OSError`."""
    if is_remote(source):
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{argument}: there is no file {path}; expected UTF-8 text, .jsonl, .parquet or a token file; a dataset of "
            "the Hub is named hub:OWNER/NAME"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; name the text files in it, e.g. {path}/*.txt")


def _read_source(source: str, tokenizer: Any, column: str, most: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int32 `[n]` of one source, and where its documents begin, int64."""
    path = Path(source)
    if path.suffix == ".safetensors" and not is_remote(source):
        ids, starts = _read_tokens(path)
        return (ids, starts) if most is None else (ids[:most], starts[starts < most])
    parts: list[torch.Tensor] = []
    lengths = [0]
    total = 0
    encoder = TextEncoder(tokenizer)
    for texts in _batches(documents(source, column)):
        for tokens in encoder.texts(texts):
            if len(tokens) >= MIN_TOKENS and tokenizer.eos_token_id is not None:
                tokens = [*tokens, tokenizer.eos_token_id]
            if not tokens or (most is not None and total >= most):
                continue
            parts.append(torch.tensor(tokens, dtype=torch.int32))
            lengths.append(len(tokens))
            total += len(tokens)
        if most is not None and total >= most:
            break
    if not parts:
        raise ValueError(f"data: {source} is empty: none of its documents holds text")
    return torch.cat(parts), torch.tensor(lengths[:-1]).cumsum(0)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Several documents at once for the tokenizer; those without text are left out."""
    batch: list[str] = []
    for text in texts:
        if text.strip():
            batch.append(text)
        if len(batch) == DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_tokens(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            names = sorted(opened.keys())
            if TOKENS_KEY not in names:
                raise ValueError(
                    f"data: {path} has no tensor {TOKENS_KEY!r} (it has {', '.join(names[:3]) or 'none'}); expected a "
                    "token file as scripts/tokenize_text.py writes it"
                )
            ids = opened.get_tensor(TOKENS_KEY)
            starts = opened.get_tensor(STARTS_KEY) if STARTS_KEY in names else torch.zeros(1, dtype=torch.int64)
    except SafetensorError as error:
        raise ValueError(f"data: {path} is truncated or not a safetensors file ({error})") from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"data: {TOKENS_KEY} in {path} must be integers [n], got {ids.dtype} {list(ids.shape)}; flatten it"
        )
    ascending = starts.dtype == torch.int64 and starts.ndim == 1 and len(starts) and bool((starts.diff() > 0).all())
    if not ascending or starts[0] != 0 or starts[-1] >= max(1, len(ids)):
        raise ValueError(f"data: {STARTS_KEY} in {path} must be ascending int64 from 0 to less than the tokens")
    return ids.to(torch.int32), starts
