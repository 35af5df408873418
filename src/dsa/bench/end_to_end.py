"""A whole model: prefill and decoding, sparse compared with the same model as transformers runs it.

Two copies of the model are loaded, so that both can take turns. Positions beyond those that the model was trained on
are extrapolated by both alike, which changes no time.

Shapes: `n` tokens of the prompt.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dsa.bench.caches import check_caches, check_prompt, filled_cache, fits, masked_prefill_bytes
from dsa.bench.measure import Figure, Timing, parts_in_turn, ratio
from dsa.bench.pair import Pair, check_selections, load_pair
from dsa.bench.recording import long_ids
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.generation.session import PREFILL_CHUNK, Session
from dsa.models.default_model import Status
from dsa.models.sparse import is_sparse
from dsa.runs.progress import Progress

PROMPT_LENGTHS = (32768,)
SHORTEST_PROMPT = 1024
"""As short as a prompt becomes by itself where the peer cannot read a longer one."""

SHORT_TOKENS = 512
CACHED_LENGTHS = (8192, 32768, 131072)
DECODED = 16
"""Tokens that are decoded after a prompt, and in one turn."""
LONG_TOKEN_SECONDS = 1.0
"""A contender whose tokens take longer decodes `FEWEST_DECODED` of them a turn."""
FEWEST_DECODED = 2
LEAST_TURNS = 5
MOST_TURNS = 100
RESERVED_TOKENS = 2 * DECODED * (MOST_TURNS + 2)
"""Room after a cache for the turns of a row and those of the growth with the cache."""
TURNS = (
    f"Decoding takes turns of {DECODED} tokens ({FEWEST_DECODED} where a token takes more than "
    f"{LONG_TOKEN_SECONDS:g} s); a turn's time is that of all its tokens, the first included."
)
MASKED = (
    "The model was born with DSA. SDPA is transformers' path through it: scores of all pairs of tokens, keys and "
    "values of every head expanded out of the cached latents for every token, and a mask over dense attention."
)


def read_prompt(model: Any, ids: Tensor) -> tuple[float, Any, Tensor]:
    """Seconds of a prefill with an empty cache, the cache, and the most likely next token `[1, 1]`.

    A sparse model reads as `dsa generate` lets it, in chunks into a cache of the right size; a plain one as
    transformers' `generate` does unless told otherwise, all at once.
    """
    if is_sparse(model):
        session = Session(model)
        session.read(ids[0].tolist(), new_tokens=RESERVED_TOKENS)
        assert session.logits is not None
        return session.timings.read_s, session.cache, session.logits.argmax()[None, None]
    began = time.perf_counter()
    cache = DynamicCache(config=model.config)
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began, cache, output.logits[:, -1:].argmax(dim=-1)


class Decoder:
    """Greedy decoding, a token a call."""

    def __init__(self, model: Any, cache: Any, token: Tensor) -> None:
        self.model, self.cache, self.token = model, cache, token

    def __call__(self) -> None:
        output = self.model(self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(dim=-1)


def decode_in_turn(decoders: Mapping[str, Decoder], settings: Settings) -> dict[str, Timing]:
    """Seconds a token, once for each turn: all tokens of the turn, the first included, over their number.

    A contender decodes several tokens before the other has its turn, as it would for a user. After every turn the
    processor's caches hold the other model; one token a turn would measure little but that.
    """

    def turn(name: str, decoder: Decoder) -> dict[str, float]:
        began = time.perf_counter()
        for done in range(1, (FEWEST_DECODED if settings.quick else DECODED) + 1):
            decoder()
            seconds = (time.perf_counter() - began) / done
            if done >= FEWEST_DECODED and seconds > LONG_TOKEN_SECONDS:
                break
        return {name: seconds}

    turns = [functools.partial(turn, name, decoder) for name, decoder in decoders.items()]
    least = FEWEST_DECODED if settings.quick else LEAST_TURNS
    return parts_in_turn(turns, budget=settings.budget, least=least, most=MOST_TURNS)


def short(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """Prompts that sparse attention cannot help: it must not harm, either."""
    pair = load_pair(settings, status)
    (tokens,) = settings.lengths_or((SHORT_TOKENS,), (24,))[:1]
    ids = long_ids(pair.plain.tokenizer, tokens)
    new_tokens = 2 if settings.quick else DECODED

    def contender(name: str, model: Any) -> Callable[[], Mapping[str, float]]:
        def run() -> dict[str, float]:
            seconds, cache, token = read_prompt(model, ids)
            decoder = Decoder(model, cache, token)
            began = time.perf_counter()
            for _ in range(new_tokens):
                decoder()
            per_token = (time.perf_counter() - began) / new_tokens
            return {f"{name} prefill": seconds, f"{name} token": per_token}

        return run

    with progress(f"prompt of {tokens:,}, in pairs", 1) as advance:
        timings = parts_in_turn(
            [contender(name, model) for name, model in pair.models().items()], budget=settings.budget
        )
        advance()
    yield _prompt_row("short", tokens, pair, timings)


def prompt(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A long prompt, then tokens, several a turn."""
    pair = load_pair(settings, status)
    for tokens in _prompt_lengths(pair, settings):
        ids = long_ids(pair.plain.tokenizer, tokens)
        prefills, decoders = {}, {}
        for name, model in reversed(pair.models().items()):
            with progress(f"{name}: prefill of {tokens:,}", 1) as advance:
                seconds, cache, token = read_prompt(model, ids)
                advance()
            prefills[f"{name} prefill"] = Timing((seconds,))
            decoders[f"{name} token"] = Decoder(model, cache, token)
        with progress(f"decoding after {tokens:,}, in turn", 1) as advance:
            decoded = decode_in_turn(decoders, settings)
            advance()
        yield _prompt_row("prompt", tokens, pair, {**prefills, **decoded})
        del decoders, cache


def _prompt_lengths(pair: Pair, settings: Settings) -> tuple[int, ...]:
    """The user's, or the usual ones; transformers may need more memory for a model born with DSA than there is.

    Raises:
        ValueError: A length that the user named is one of those.
    """
    lengths = settings.lengths_or(PROMPT_LENGTHS, (96,))
    if not pair.born_with_dsa:
        return lengths
    config = pair.plain.model.config
    if settings.lengths is None:
        longest = lengths[-1]
        while longest > SHORTEST_PROMPT and not fits(masked_prefill_bytes(config, longest)):
            longest //= 2
        lengths = (longest,)
    for tokens in lengths:
        check_prompt(config, tokens)
    return lengths


def _prompt_row(
    name: str,
    tokens: int,
    pair: Pair,
    timings: dict[str, Timing],
) -> Row:
    row = Row(name, f"n = {tokens:,}", {"tokens": tokens, **pair.shape}, timings, checks=list(pair.checks))
    row.length = tokens
    row.figures = [
        ratio("prefill, SDPA / DSA", timings["SDPA prefill"], timings["DSA prefill"]),
        ratio("decode, SDPA / DSA", timings["SDPA token"], timings["DSA token"]),
        Figure("DSA prefill", tokens / timings["DSA prefill"].median, "tokens/s"),
        Figure("DSA decode", 1 / timings["DSA token"].median, "tokens/s"),
    ]
    row.notes = [
        "SDPA: transformers, attn_implementation sdpa, its own dynamic cache, the prompt at once. DSA: as `dsa "
        f"generate` reads, chunks of {PREFILL_CHUNK:,} into a reserved cache. Last logits only.",
        TURNS,
        *([MASKED] if pair.born_with_dsa else []),
    ]
    return row


def decode(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A token with a long cache, and how its time grows with the cache."""
    pair = load_pair(settings, status)
    lengths = settings.lengths_or(CACHED_LENGTHS, (64, 128))
    check_caches(pair.plain.model, lengths)
    token = torch.ones(1, 1, dtype=torch.long)
    sparse: dict[int, Decoder] = {}
    for tokens in lengths:
        with progress(f"decoding with {tokens:,} cached", 1) as advance:
            cache = filled_cache(pair.sparse.model, tokens, sparse=True, reserved=RESERVED_TOKENS)
            said = check_selections(pair.sparse.model, token, cache)
            sparse[tokens] = Decoder(pair.sparse.model, cache, token)
            peer = Decoder(pair.plain.model, filled_cache(pair.plain.model, tokens, sparse=False), token)
            timings = decode_in_turn({"SDPA": peer, "DSA": sparse[tokens]}, settings)
            del peer
            advance()
        row = Row("decode", f"{tokens:,} cached", {"cached": tokens, **pair.shape}, timings)
        row.length, row.checks = tokens, [*pair.checks, f"with the full cache, {said}"]
        row.figures = [ratio("SDPA / DSA", timings["SDPA"], timings["DSA"])]
        row.notes = [
            "The caches are filled with standard normal keys, values and index keys, equal in all layers.",
            TURNS,
            *([MASKED] if pair.born_with_dsa else []),
        ]
        yield row
    if len(lengths) > 1:
        with progress("growth with the cache, in turn", 1) as advance:
            growth = decode_in_turn({f"{tokens:,} cached": sparse[tokens] for tokens in lengths}, settings)
            advance()
        yield _growth_row(lengths, growth, pair)


def _growth_row(lengths: tuple[int, ...], timings: dict[str, Timing], pair: Pair) -> Row:
    first, last = lengths[0], lengths[-1]
    row = Row("decode", f"growth from {first:,} to {last:,}", pair.shape, timings, checks=list(pair.checks))
    row.notes = [TURNS]
    row.figures = [
        ratio(
            f"{last:,} / {first:,}",
            timings[f"{last:,} cached"],
            timings[f"{first:,} cached"],
        )
    ]
    return row
