"""A model's cache with the tokens in it, for many prompts one after another. Nothing here prints.

A session reads a prompt in chunks and writes tokens. Both are iterators, so that others can have their turn between two
chunks or two tokens, and both can be stopped there. What a prompt has in common with what is held is not read again.

    session = Session(model)
    session.read(ids, new_tokens=128)
    for token in session.write(128):
        ...

Shapes: `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from dsa.generation.sampling import GREEDY, Chooser, Sampling
from dsa.models.context import DSAContext
from dsa.models.decoder import decoder_layers
from dsa.models.rope import angle_set, angles_for, depends_on_length, is_two_sets, length_read
from dsa.modules.cache import IndexedLayer, reserve
from dsa.runs.progress import Advance, Progress, silent
from dsa.store import ModelStore, Opened
from dsa.store.recording import Recorder

PREFILL_CHUNK = 4096
"""Prompt tokens read in one pass: what a layer holds without the cache stays as small as for a prompt of this size."""

ContextMaker = Callable[[], DSAContext]


@dataclass
class Timings:
    """What the latest prompt and its answer took. Time that others had between chunks and tokens does not count.

    Args:
        held: Tokens of the prompt that were in the cache and were not read again.
        opened: Those of them that came from the store, where it was opened for this prompt.
        open_s: Seconds for opening them.
        opened_read_s: Seconds that reading them took, when they were read.
        read: Tokens that were read.
        read_s: Seconds for reading them.
        first_token_s: Seconds from the beginning of the reading to the first token; `None` before there is one.
        written: Tokens written, one that ends the text included.
        later_s: Seconds for the tokens after the first.
    """

    held: int = 0
    opened: int = 0
    open_s: float = 0.0
    opened_read_s: float = 0.0
    read: int = 0
    read_s: float = 0.0
    first_token_s: float | None = None
    written: int = 0
    later_s: float = 0.0

    @property
    def token_s(self) -> float | None:
        """Seconds a token after the first, mean; `None` where there is none."""
        return self.later_s / (self.written - 1) if self.written > 1 else None


@dataclass(frozen=True)
class Kept:
    """What is in the store of a prompt.

    Args:
        name: Of the entry.
        tokens: How many of the prompt's first tokens.
        bytes: What they take.
    """

    name: str
    tokens: int
    bytes: int


class Session:
    """See the module.

    Attributes:
        cache: The cache. It is another one after tokens had to be forgotten that it could not give back.
        token_ids: The tokens in it, in order.
        logits: fp32 `[V]`, of the token that follows them; `None` where the last prompt was not read to its end, or
            where the token has been chosen.
        timings: Of the latest prompt and its answer.
        kept: What of the latest prompt that was finished is in the store; `None` where nothing was added.
        stop: Asked before every chunk and every token; where it says `True`, reading and writing end.
    """

    def __init__(
        self,
        model: Any,
        *,
        cache: DynamicCache | None = None,
        token_ids: Sequence[int] = (),
        chunk: int = PREFILL_CHUNK,
        stop: Callable[[], bool] = lambda: False,
        store: ModelStore | None = None,
        document: str = "",
    ) -> None:
        """
        Args:
            model: A causal language model: plain, attached or accelerated.
            cache: What to read into, such as a stored document's cache; by default an empty one.
            token_ids: The tokens that are in `cache`.
            chunk: Prompt tokens read in one pass.
            stop: See above.
            store: Where prompts are opened from and kept in; see `close`.
            document: What to call what is kept.
        """
        self.model, self.chunk, self.stop = model, chunk, stop
        self.store, self.document = store, document
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.token_ids = list(token_ids)
        self.logits: torch.Tensor | None = None
        self.timings = Timings()
        self.kept: Kept | None = None
        self._context: ContextMaker | None = None
        self._recorder: Recorder | None = None
        self._kept_s = 0.0
        self._opened: Opened | None = None
        self._prompts = 0
        # The length that the angles are those of, and which angles what is held was turned by; `None` is unknown.
        self._length = 0
        self._angles = None if self.token_ids and depends_on_length(model.config) else angle_set(model.config, 0)

    @contextmanager
    def using(self, context: ContextMaker) -> Iterator[None]:
        """Every pass within it gets what `context` makes, as its `dsa_context`: an observer, or another selection."""
        before, self._context = self._context, context
        try:
            yield
        finally:
            self._context = before

    def read(
        self, ids: Sequence[int], *, new_tokens: int = 0, keep: int | None = None, progress: Progress = silent
    ) -> None:
        """Reads a prompt to its end, or until `stop` says so; arguments and errors as in `chunks`."""
        for _ in self.chunks(ids, new_tokens=new_tokens, keep=keep, progress=progress):
            pass

    def chunks(
        self, ids: Sequence[int], *, new_tokens: int = 0, keep: int | None = None, progress: Progress = silent
    ) -> Iterator[int]:
        """Reads a prompt, a chunk at each step. Closing the iterator stops; what was read stays.

        The tokens that the cache holds are kept as far as the prompt begins with them, the others are forgotten. The
        last token of the prompt is always read, because what follows it is asked for.

        Args:
            ids: The whole prompt, at least one token.
            new_tokens: Makes room for so many tokens after the prompt, so that the cache need not grow for them.
            keep: How many of the first tokens are worth keeping, where there is a store: the document without the
                question. By default all.
            progress: Shows tokens.

        Yields:
            After each chunk, how many tokens of the prompt the cache holds.

        Raises:
            ValueError: The prompt is empty.
        """
        if not ids:
            raise ValueError("ids: the prompt is empty; give at least one token")
        began = time.perf_counter()
        self._prompts += 1
        prompt = self._prompts
        self.open(ids)
        self._turn_by(length_read(self.model.config, len(ids), new_tokens))
        self.timings = timings = self._taken_opening()
        reserve(self.cache, len(ids) + new_tokens)
        timings.held = held = len(self.token_ids)
        kept = list(ids[: len(ids) if keep is None else keep])
        if self.store is not None and depends_on_length(self.model.config):
            self.store.not_kept("the model's keys depend on how long the text around them is (its RoPE scaling)")
        elif self.store is not None:
            self._recorder = self.store.recorder(kept, self.document)
        waited = 0.0
        with progress(f"Reading {len(ids) - held:,} tokens", len(ids) - held) as advance:
            for start, end in self._pieces(held, len(kept), len(ids)):
                if self.stop() or prompt != self._prompts:
                    return
                part = ids[start:end]
                with _layers_shown(self.model, len(part), advance):
                    self.feed(part)
                timings.read += len(part)
                if end < len(ids):
                    self.logits = None
                elif self.model.device.type == "cuda":
                    torch.cuda.synchronize(self.model.device)
                self._keep(end, time.perf_counter() - began - waited, len(ids) + new_tokens)
                left = time.perf_counter()
                timings.read_s = left - began - waited
                yield len(self.token_ids)
                waited += time.perf_counter() - left

    def _pieces(self, held: int, kept: int, total: int) -> Iterator[tuple[int, int]]:
        """Where each pass begins and ends. What is kept ends with a pass."""
        ends = [kept, total] if self._recorder is not None and held < kept < total else [total]
        for end in ends:
            for start in range(held, end, self.chunk):
                yield start, min(start + self.chunk, end)
            held = end

    def open(self, ids: Sequence[int]) -> int:
        """Keeps what is held of a prompt, or takes what the store has, if that is more. `chunks` does the same.

        Args:
            ids: The whole prompt, at least one token. Its last is never among what is held.

        Returns:
            How many of its tokens need not be read.
        """
        self.close()
        self.crop(min(common_prefix(self.token_ids, ids), len(ids) - 1))
        # What is stored does not say which angles its keys were turned by, where a model has several.
        if self.store is None or depends_on_length(self.model.config):
            return len(self.token_ids)
        opened = self.store.open(ids[:-1], held=len(self.token_ids))
        if opened is not None:
            self.cache, self.token_ids, self._opened = opened.cache, opened.token_ids, opened
        return len(self.token_ids)

    def _taken_opening(self) -> Timings:
        """Timings of a prompt that is about to be read, with what was opened for it."""
        opened, self._opened = self._opened, None
        if opened is None or opened.cache is not self.cache:
            return Timings()
        return Timings(opened=len(self.token_ids), open_s=opened.seconds, opened_read_s=opened.read_s)

    def _keep(self, end: int, seconds: float, total: int) -> None:
        """Has what was read so far written to the store, as far as it is to be kept."""
        recorder = self._recorder
        if recorder is None or end > len(recorder.ids):
            return
        recorder.add(self.cache, end, seconds - self._kept_s)
        self._kept_s = seconds
        lies_in_file = recorder.lie_in_file(self.cache, total)
        if lies_in_file and recorder.problem:
            raise OSError(
                f"store: the text does not fit into memory, and no more of it can be written ({recorder.problem}); "
                "free space, name another store, or give fewer tokens"
            )

    def close(self) -> None:
        """Waits until what was read is on disk, where there is a store. The session can be used on.

        What is not kept and why goes to the log, `logging.getLogger("dsa")`.
        """
        recorder, self._recorder, self._kept_s = self._recorder, None, 0.0
        if recorder is None:
            return
        recorder.close()
        if recorder.problem:
            assert self.store is not None
            self.store.not_kept(recorder.problem)
        self.kept = Kept(recorder.name, recorder.tokens, recorder.bytes) if recorder.tokens else None

    def keep_answer(self) -> None:
        """Keeps what follows the stored document, question and answer, where there is a store: the next turn of the
        conversation is then opened, by this process or another, and not read again.

        The token that was written last is not in the cache, and is read with the next turn.
        """
        self.close()
        if self.store is not None and not depends_on_length(self.model.config):
            self.store.keep_tail(self.token_ids, self.cache)

    def write(self, max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        """Continues what was read, a token at each step. Closing the iterator stops.

        A token is read into the cache when the next one is asked for, so the last one written is not in it. Writing
        ends where another prompt is read.

        Args:
            max_new_tokens: Tokens to write at most.
            sampling: How they are chosen.

        Yields:
            Token ids. One that ends the text is the last.

        Raises:
            ValueError: No prompt has been read to its end, or the model's output is not finite.
        """
        if self.stop():
            return
        timings, prompt = self.timings, self._prompts
        began = time.perf_counter()
        chooser = Chooser(self.model, sampling, self.token_ids, max_new_tokens)
        while True:
            token = chooser(self._taken_logits())
            timings.written += 1
            seconds = time.perf_counter() - began
            if timings.written == 1:
                timings.first_token_s = timings.read_s + seconds
            else:
                timings.later_s += seconds
            yield token
            if token in chooser.ends or timings.written >= max_new_tokens:
                return
            if self.stop() or prompt != self._prompts:
                return
            began = time.perf_counter()
            with self._decoding():
                self.feed([token])

    def feed(self, ids: Sequence[int]) -> None:
        """Reads these tokens in one pass after what is held; `logits` are then those of the token after them."""
        length = max(self._length, len(self.token_ids) + len(ids))
        if is_two_sets(self.model.config) and angle_set(self.model.config, length) != self._angles:
            # Longer than was planned: what is held has the angles of a short text, and is read again.
            held = self.token_ids
            self._turn_by(length)
            for start in range(0, len(held), self.chunk):
                self.feed(held[start : start + self.chunk])
        options = {} if self._context is None else {"dsa_context": self._context()}
        tokens = torch.tensor([list(ids)], device=self.model.device)
        try:
            with torch.no_grad(), angles_for(self.model, length):
                output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **options)
        except BaseException:
            # Some layers may have these tokens already.
            self.crop(len(self.token_ids))
            raise
        self.token_ids += ids
        self.logits = output.logits[0, -1].to(torch.float32)

    def crop(self, tokens: int) -> None:
        """Forgets all but the first `tokens` tokens.

        Sliding windows and other caches that keep no more than they need cannot give tokens back: then all are
        forgotten.
        """
        self.logits = None
        kept = self.token_ids[:tokens]
        layers: list[Any] = self.cache.layers
        try:
            for layer in layers:
                surplus = layer.get_seq_length() - len(kept)
                # Ours also drop index keys of tokens whose pass was broken off.
                if surplus > 0 or isinstance(layer, IndexedLayer):
                    layer.crop(-max(0, surplus))
            self.token_ids = kept
        except (RuntimeError, NotImplementedError, ValueError):
            self.empty()

    def _turn_by(self, length: int) -> None:
        """Has what is read from here on turned by the angles of a text of this length, and forgets what was not."""
        angles = angle_set(self.model.config, length)
        if angles != self._angles and self.token_ids:
            self.empty()
        self._length, self._angles = length, angles

    def empty(self) -> None:
        """Forgets everything, and lets go of the cache."""
        self.cache, self.token_ids, self.logits = DynamicCache(config=self.model.config), [], None

    def _taken_logits(self) -> torch.Tensor:
        logits, self.logits = self.logits, None
        if logits is None:
            raise ValueError("nothing follows: no prompt has been read to its end; call read(ids) before write()")
        return logits

    def _decoding(self) -> AbstractContextManager[Any]:
        """On a GPU transformers has mixtures of experts take another path for single tokens."""
        return nullcontext() if self.model.device.type == "cpu" else self.model._optimize_model_for_decode()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(first, second))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


@contextmanager
def _layers_shown(model: Any, tokens: int, advance: Advance) -> Iterator[None]:
    """Shows one pass over so many tokens layer by layer, as tokens."""
    layers = decoder_layers(model)
    passed = shown = 0

    def layer_done(*_: Any) -> None:
        nonlocal passed, shown
        passed += 1
        reached = tokens * min(passed, len(layers)) // len(layers)
        advance(reached - shown)
        shown = reached

    hooks = [layer.register_forward_hook(layer_done) for layer in layers]
    try:
        yield
        advance(tokens - shown)
    finally:
        for hook in hooks:
            hook.remove()
