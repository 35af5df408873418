"""A whole model: prefill and decoding, attached beside the same model with torch's dense attention.

Two copies of the model are loaded, so that both can take turns. Positions beyond those that the model was trained on
are extrapolated by both alike, which changes no time.

Shapes: `n` tokens of the prompt.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dsa.bench.agreement import ROWS, check_close
from dsa.bench.measure import Disagreement, Figure, Timing, parts_in_turn, ratio
from dsa.bench.recording import long_ids
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.eval.progress import Progress
from dsa.models.attachment import config_of, is_attached, report_of
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.families import family_of
from dsa.models.loading import LoadedModel, Status, attach_indexers, load_model
from dsa.models.native.families import refuse_native
from dsa.modules.cache import indexed_layer, reserve
from dsa.modules.latents import latent_layer
from dsa.ops import index_topk

TOP_K = 1024
QUICK_BUDGET = {"top_k": 32, "local": 8}
PROMPT_LENGTHS = (32768,)
SHORT_TOKENS = 512
CACHED_LENGTHS = (8192, 32768, 131072)
PREFILL_CHUNK = 4096
"""As `dsa generate` reads."""

DECODED = 16
"""Tokens that are decoded after a prompt, and in one turn."""
LONG_TOKEN_SECONDS = 1.0
"""A contender whose tokens take longer decodes `FEWEST_DECODED` of them a turn."""
FEWEST_DECODED = 2
LEAST_TURNS = 5
MOST_TURNS = 100
RESERVED_TOKENS = 2 * DECODED * (MOST_TURNS + 2)
"""Room behind a cache for the turns of a row and those of the growth with the cache."""
CHECK_TOKENS = 300
LOGIT_ERROR = 1e-3
SPARE_BYTES = 2 << 30
TURNS = (
    f"Decoding takes turns of {DECODED} tokens ({FEWEST_DECODED} where a token takes more than "
    f"{LONG_TOKEN_SECONDS:g} s); a turn's time is that of all its tokens, the first included."
)
PREFILL_TARGETS = {32768: 3}
DECODE_TARGETS = {32768: 5}
CACHED_TARGETS = {131072: 30}
GROWTH_TARGET = 1.3
SHORT_TARGET = 0.95


@dataclass(frozen=True)
class Pair:
    """The attached model and the plain one, and what was checked of them."""

    attached: LoadedModel
    plain: LoadedModel
    checks: list[str]
    shape: dict[str, Any]

    def models(self) -> dict[str, Any]:
        """Both, peer first, by the names that rows use."""
        return {"SDPA": self.plain.model, "DSA": self.attached.model}


def load_pair(settings: Settings, status: Status) -> Pair:
    """Loads the model twice, attaches one, and checks that they agree where they must.

    Raises:
        Disagreement: They do not.
        OSError: The model cannot be read.
        ValueError: It cannot be attached.
    """
    plain = load_model(settings.model, device="cpu", status=status)
    refuse_native(settings.model, plain.model.config)
    attached = load_model(settings.model, device="cpu", status=status)
    budget = QUICK_BUDGET if settings.quick else {"top_k": TOP_K}
    status("Comparing with the plain model and with the reference")
    ids = long_ids(attached.tokenizer, CHECK_TOKENS if not settings.quick else 2 * QUICK_BUDGET["top_k"])
    attach_indexers(attached, None, top_k=max(ids.shape[1], 512), dense_shortcut=False)
    everything = attached.model(ids).logits
    said = [check_close("logits with all selected", everything, plain.model(ids).logits, LOGIT_ERROR)]
    report, _ = attach_indexers(attached, None, dense_shortcut=True, **budget)
    more = long_ids(attached.tokenizer, 2 * report.config.top_k)
    said.append(check_selections(attached.model, more, None))
    config = plain.model.config.get_text_config()
    shape = {
        "model": settings.model,
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "dense_layers": report.count("dense"),
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        **{name: getattr(report.config, name) for name in ("top_k", "index_heads", "index_head_dim", "sinks", "local")},
    }
    return Pair(attached, plain, said, shape)


def check_selections(model: Any, ids: Tensor, cache: Any) -> str:
    """Runs an attached model and compares what each layer selects for its last queries with the reference.

    Raises:
        Disagreement: A layer selects something else.
    """
    config, compared = config_of(model), 0

    def observe(call: AttentionCall) -> None:
        nonlocal compared
        if call.indices is None or call.index_query is None or call.index_weight is None or call.index_key is None:
            return
        rows = slice(-ROWS, None)
        expected = index_topk(
            call.index_query[:, rows],
            call.index_key,
            call.index_weight[:, rows],
            call.indices.shape[-1],
            sinks=config.sinks,
            local=config.layer_local(call.layer),
            key_start=call.key_start[:, rows],
            key_end=call.key_end[:, rows],
            impl="reference",
        )
        if not torch.equal(call.indices[:, rows], expected):
            raise Disagreement(f"layer {call.layer} selects other tokens than the reference")
        compared += 1

    context = DSAContext(observer=observe)
    model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1, dsa_context=context)
    return f"selection equal in {compared} layers"


def read_prompt(model: Any, ids: Tensor) -> tuple[float, Any, Tensor]:
    """Seconds of a prefill with an empty cache, the cache, and the most likely next token `[1, 1]`.

    An attached model reads as `dsa generate` lets it, in chunks into a cache of the right size; a plain one as
    transformers' `generate` does unless told otherwise, all at once.
    """
    tokens = ids.shape[1]
    began = time.perf_counter()
    cache = DynamicCache(config=model.config)
    chunk = tokens
    if is_attached(model):
        reserve(cache, tokens + RESERVED_TOKENS)
        chunk = PREFILL_CHUNK
    for start in range(0, tokens, chunk):
        output = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - began
    return seconds, cache, output.logits[:, -1:].argmax(dim=-1)


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
    yield _prompt_row("short", tokens, pair, timings, SHORT_TARGET, SHORT_TARGET)


def prompt(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A long prompt, then tokens, several a turn."""
    pair = load_pair(settings, status)
    for tokens in settings.lengths_or(PROMPT_LENGTHS, (96,)):
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
        yield _prompt_row(
            "prompt", tokens, pair, {**prefills, **decoded}, PREFILL_TARGETS.get(tokens), DECODE_TARGETS.get(tokens)
        )
        del decoders, cache


def _prompt_row(
    name: str,
    tokens: int,
    pair: Pair,
    timings: dict[str, Timing],
    prefill_target: float | None,
    decode_target: float | None,
) -> Row:
    row = Row(name, f"n = {tokens:,}", {"tokens": tokens, **pair.shape}, timings, checks=list(pair.checks))
    row.length = tokens
    row.figures = [
        ratio("prefill, SDPA / DSA", timings["SDPA prefill"], timings["DSA prefill"], target=prefill_target),
        ratio("decode, SDPA / DSA", timings["SDPA token"], timings["DSA token"], target=decode_target),
        Figure("DSA prefill", tokens / timings["DSA prefill"].median, "tokens/s"),
        Figure("DSA decode", 1 / timings["DSA token"].median, "tokens/s"),
    ]
    row.notes = [
        "SDPA: transformers, attn_implementation sdpa, its own dynamic cache, the prompt at once. DSA: as `dsa "
        f"generate` reads, chunks of {PREFILL_CHUNK:,} into a reserved cache. Last logits only.",
        TURNS,
    ]
    return row


def decode(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """A token with a long cache, and how its time grows with the cache."""
    pair = load_pair(settings, status)
    lengths = settings.lengths_or(CACHED_LENGTHS, (64, 128))
    _check_memory(pair.plain.model, lengths)
    token = torch.ones(1, 1, dtype=torch.long)
    attached: dict[int, Decoder] = {}
    for tokens in lengths:
        with progress(f"decoding with {tokens:,} cached", 1) as advance:
            cache = filled_cache(pair.attached.model, tokens, attached=True)
            said = check_selections(pair.attached.model, token, cache)
            attached[tokens] = Decoder(pair.attached.model, cache, token)
            peer = Decoder(pair.plain.model, filled_cache(pair.plain.model, tokens, attached=False), token)
            timings = decode_in_turn({"SDPA": peer, "DSA": attached[tokens]}, settings)
            del peer
            advance()
        row = Row("decode", f"{tokens:,} cached", {"cached": tokens, **pair.shape}, timings)
        row.length, row.checks = tokens, [*pair.checks, f"with the full cache, {said}"]
        row.figures = [ratio("SDPA / DSA", timings["SDPA"], timings["DSA"], target=CACHED_TARGETS.get(tokens))]
        row.notes = [
            "The caches are filled with standard normal keys, values and index keys, equal in all layers.",
            TURNS,
        ]
        yield row
    if len(lengths) > 1:
        with progress("growth with the cache, in turn", 1) as advance:
            growth = decode_in_turn({f"{tokens:,} cached": attached[tokens] for tokens in lengths}, settings)
            advance()
        yield _growth_row(lengths, growth, pair)


def _growth_row(lengths: tuple[int, ...], timings: dict[str, Timing], pair: Pair) -> Row:
    first, last = lengths[0], lengths[-1]
    row = Row("decode", f"growth from {first:,} to {last:,}", pair.shape, timings, checks=list(pair.checks))
    row.notes = [TURNS]
    target = GROWTH_TARGET if (first, last) == (CACHED_LENGTHS[0], CACHED_LENGTHS[-1]) else None
    row.figures = [
        ratio(
            f"{last:,} / {first:,}",
            timings[f"{last:,} cached"],
            timings[f"{first:,} cached"],
            target=target,
            at_least=False,
        )
    ]
    return row


def filled_cache(model: Any, tokens: int, *, attached: bool) -> Any:
    """A cache of normal random keys and values, as if a text of so many tokens had been read.

    Args:
        model: Gives the shapes.
        tokens: How many are cached.
        attached: Whether to make dsa's layers with index keys, as its hook does, or transformers' own.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(tokens)
    key, value = (torch.randn(1, heads, tokens, dim, generator=generator) for heads, dim in _cached_shapes(config))
    cache = DynamicCache(config=model.config)
    if not attached:
        for layer in range(config.num_hidden_layers):
            cache.update(key, value, layer)
        return cache
    own = config_of(model)
    index_keys = torch.randn(1, tokens, own.index_head_dim, generator=generator)
    for row in report_of(model).layers:
        has_indexer = own.has_indexer(row.layer)
        index_dtype = own.index_dtype if has_indexer else None
        stored: Any
        if family_of(model).latent is not None:
            stored = latent_layer(cache, row.layer, config.kv_lora_rank, index_dtype)
        else:
            stored = indexed_layer(cache, row.layer, index_dtype)
        stored.reserve(tokens + RESERVED_TOKENS)
        if has_indexer:
            stored.append_index(index_keys)
        stored.update(key, value)
    return cache


def _cached_shapes(config: Any) -> list[tuple[int, int]]:
    """Heads and dims of the two things that a layer caches: keys and values, or latents and rotated key dims."""
    if getattr(config, "kv_lora_rank", None):
        return [(1, config.kv_lora_rank), (1, config.qk_rope_head_dim)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(config.num_key_value_heads, head_dim)] * 2


def _check_memory(model: Any, lengths: tuple[int, ...]) -> None:
    """Refuses, before anything is filled, what would not fit.

    Raises:
        ValueError: The caches need more memory than is free.
    """
    config = model.config.get_text_config()
    per_token = config.num_hidden_layers * sum(heads * dim for heads, dim in _cached_shapes(config)) * 4
    needed = (sum(lengths) + max(lengths)) * per_token + SPARE_BYTES
    available = _available_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"lengths: caches of {', '.join(map(str, lengths))} tokens, sparse and dense, need {needed / 1e9:.0f} GB, "
            f"{available / 1e9:.0f} GB are free; name fewer or shorter ones with --lengths"
        )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
