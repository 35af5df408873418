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
from dsa.modules.cache import IndexedLayer, reserve
from dsa.runs.progress import Advance, Progress, silent

PREFILL_CHUNK = 4096
"""Prompt tokens read in one pass: what a layer holds besides the cache stays as small as for a prompt of this size."""

ContextMaker = Callable[[], DSAContext]


@dataclass
class Timings:
    """What the latest prompt and its answer took. Time that others had between chunks and tokens does not count.

    Args:
        held: Tokens of the prompt that were in the cache and were not read again.
        read: Tokens that were read.
        read_s: Seconds for reading them.
        first_token_s: Seconds from the beginning of the reading to the first token; `None` before there is one.
        written: Tokens written, one that ends the text included.
        later_s: Seconds for the tokens after the first.
    """

    held: int = 0
    read: int = 0
    read_s: float = 0.0
    first_token_s: float | None = None
    written: int = 0
    later_s: float = 0.0

    @property
    def token_s(self) -> float | None:
        """Seconds a token after the first, mean; `None` where there is none."""
        return self.later_s / (self.written - 1) if self.written > 1 else None


class Session:
    """See the module.

    Attributes:
        cache: The cache. It is another one after tokens had to be forgotten that it could not give back.
        token_ids: The tokens in it, in order.
        logits: fp32 `[V]`, of the token that follows them; `None` where the last prompt was not read to its end, or
            where the token has been chosen.
        timings: Of the latest prompt and its answer.
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
    ) -> None:
        """
        Args:
            model: A causal language model: plain, attached or accelerated.
            cache: What to read into, such as a stored document's cache; by default an empty one.
            token_ids: The tokens that are in `cache`.
            chunk: Prompt tokens read in one pass.
            stop: See above.
        """
        self.model, self.chunk, self.stop = model, chunk, stop
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.token_ids = list(token_ids)
        self.logits: torch.Tensor | None = None
        self.timings = Timings()
        self._context: ContextMaker | None = None
        self._prompts = 0

    @contextmanager
    def using(self, context: ContextMaker) -> Iterator[None]:
        """Every pass within it gets what `context` makes, as its `dsa_context`: an observer, or another selection."""
        before, self._context = self._context, context
        try:
            yield
        finally:
            self._context = before

    def read(self, ids: Sequence[int], *, new_tokens: int = 0, progress: Progress = silent) -> None:
        """Reads a prompt to its end, or until `stop` says so; arguments and errors as in `chunks`."""
        for _ in self.chunks(ids, new_tokens=new_tokens, progress=progress):
            pass

    def chunks(self, ids: Sequence[int], *, new_tokens: int = 0, progress: Progress = silent) -> Iterator[int]:
        """Reads a prompt, a chunk at each step. Closing the iterator stops; what was read stays.

        The tokens that the cache holds are kept as far as the prompt begins with them, the others are forgotten. The
        last token of the prompt is always read, because what follows it is asked for.

        Args:
            ids: The whole prompt, at least one token.
            new_tokens: Makes room for so many tokens after the prompt, so that the cache need not grow for them.
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
        self.crop(min(common_prefix(self.token_ids, ids), len(ids) - 1))
        reserve(self.cache, len(ids) + new_tokens)
        held = len(self.token_ids)
        self.timings = timings = Timings(held=held)
        waited = 0.0
        with progress(f"Reading {len(ids) - held:,} tokens", len(ids) - held) as advance:
            for start in range(held, len(ids), self.chunk):
                if self.stop() or prompt != self._prompts:
                    return
                part = ids[start : start + self.chunk]
                with _layers_shown(self.model, len(part), advance):
                    self.feed(part)
                timings.read += len(part)
                if start + len(part) < len(ids):
                    self.logits = None
                elif self.model.device.type == "cuda":
                    torch.cuda.synchronize(self.model.device)
                left = time.perf_counter()
                timings.read_s = left - began - waited
                yield len(self.token_ids)
                waited += time.perf_counter() - left

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
        options = {} if self._context is None else {"dsa_context": self._context()}
        tokens = torch.tensor([list(ids)], device=self.model.device)
        try:
            with torch.no_grad():
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
