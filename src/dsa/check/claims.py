"""What attaching must keep, claim by claim, on one model.

A claim fails with `Broken`, and is left out with `NotTheModels` where transformers' own attention does not keep it
either: some state-space layers read no chunk after the first, and models without position ids cannot be packed.

Shapes: `B` batch, `T` tokens, `S` key tokens, `K` top-k, `V` vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from dsa.config import DSAConfig
from dsa.models import AttentionCall, DSAContext, attach, detach
from dsa.models.attached import indexers_of
from dsa.models.families import ATTACHABLE, Family, full_attention_layers
from dsa.ops import indexer_loss

SMALL = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=1, local=2)
"""A budget small enough that texts of a few dozen tokens are read sparsely."""

TOKENS = 37
NEW_TOKENS = 6
TOLERANCE = 1e-4
CHUNKS = ((0, 19), (19, 30), (30, 31), (31, 32), (32, TOKENS))


class Broken(AssertionError):
    """A claim that does not hold, and by how much."""


class NotTheModels(Exception):
    """The model does not do that with transformers' own attention."""


class Case(NamedTuple):
    """A model that is not attached, in evaluation mode, with the row that it is attached by."""

    model: Any
    family: Family

    @contextmanager
    def attached(self, **overrides: Any) -> Iterator[Any]:
        """The model attached with `SMALL` and those overrides; dense again afterwards."""
        torch.manual_seed(0)
        config = SMALL
        if self.family.latent is not None:
            config = config.replace(index_head_dim=max(8, self.model.config.qk_rope_head_dim))
        attach(self.model, config, family=self.family, **overrides)
        try:
            yield self.model
        finally:
            detach(self.model)

    def tokens(self, batch: int, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
        """Random token ids `[B, T]` without special ones."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(3, vocabulary, (batch, tokens), generator=generator)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        """`[B, T, V]`."""
        return self.model(tokens, **options).logits

    def written(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        """Token ids `[B, T + new]` of a greedy continuation, or of the beams asked for."""
        fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        return self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **fixed, **options)


def _same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    difference = (got - wanted).abs().max().item() if got.shape == wanted.shape else float("inf")
    if not difference <= TOLERANCE:
        raise Broken(f"{what} differ by {difference:.1e}, more than {TOLERANCE:.0e}")


def _as_the_model_does(case: Case, compare: Callable[[], None]) -> None:
    """A comparison of the attached model with itself; where it fails, it must fail for the model alone, too."""
    try:
        with case.attached():
            compare()
    except Exception:  # whatever a model's classes raise
        try:
            compare()
        except Exception as error:
            raise NotTheModels(f"{type(case.model).__name__} without dsa: {error}") from error
        raise


def all_tokens_equal_dense(case: Case) -> None:
    """A budget of all tokens gives transformers' own logits and greedy tokens, selecting or not."""
    tokens = case.tokens(2)
    dense, written = case.logits(tokens), case.written(tokens)
    for shortcut in (True, False):
        with case.attached(top_k=TOKENS + NEW_TOKENS, dense_shortcut=shortcut):
            _same(case.logits(tokens), dense, "logits")
            if not torch.equal(case.written(tokens), written):
                raise Broken("greedy tokens differ")


def sparse_equals_reference(case: Case) -> None:
    """A small budget changes the logits to those of transformers' eager attention, masked to what was selected."""
    tokens = case.tokens(2)
    dense, chosen = case.logits(tokens), {}

    def observe(call: AttentionCall) -> None:
        assert call.indices is not None
        picked = torch.zeros(*call.indices.shape[:2], call.key.shape[1] + 1, dtype=torch.bool)
        # The last column takes what stands for nothing.
        places = torch.where(call.indices < 0, call.key.shape[1], call.indices).long()
        chosen[call.layer] = picked.scatter_(2, places, True)[..., :-1]

    with case.attached():
        sparse = case.logits(tokens, use_cache=False, dsa_context=DSAContext(observer=observe))
    if (sparse - dense).abs().max() < 1e-3:
        raise Broken("a small budget changes nothing")
    with _eager(case.model), _masked(case, chosen):
        _same(sparse, case.logits(tokens, use_cache=False), "logits of the selection and of the eager reference")


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _masked(case: Case, chosen: dict[int, torch.Tensor]) -> Iterator[None]:
    """Layers see what was chosen for them, bool `[B, T, S]`, and nothing else."""

    def masked(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            floor = torch.finfo(torch.get_default_dtype()).min
            mask = torch.zeros(chosen[layer].shape).masked_fill(~chosen[layer], floor)[:, None]
            return args, {**kwargs, "attention_mask": mask.to(args[0].dtype if args else kwargs["hidden_states"].dtype)}

        return hook

    attentions = case.family.attention_layers(case.model)
    hooks = [attentions[layer].register_forward_pre_hook(masked(layer), with_kwargs=True) for layer in chosen]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def cached_equals_uncached(case: Case) -> None:
    """Tokens read in pieces, and one at a time, give the logits of reading them at once."""
    tokens = case.tokens(2)

    def compare() -> None:
        whole = case.logits(tokens, use_cache=False)
        cache, parts = None, []
        for begin, stop in CHUNKS:
            with torch.no_grad():
                output = case.model(tokens[:, begin:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        _same(torch.cat(parts, dim=1), whole, "logits with and without a cache")

    _as_the_model_does(case, compare)


def padding_changes_nothing(case: Case, side: str = "left") -> None:
    """Padding on a side leaves the logits of the text as they are."""
    tokens, mask = case.tokens(1), torch.ones(1, TOKENS, dtype=torch.long)
    nothing = torch.zeros(1, 9, dtype=torch.long)
    order = (lambda pad, text: (pad, text)) if side == "left" else (lambda pad, text: (text, pad))
    padded = torch.cat(order(nothing, tokens), dim=1)
    attention_mask = torch.cat(order(nothing, mask), dim=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)

    def compare() -> None:
        alone = case.logits(tokens, attention_mask=mask)
        together = case.logits(padded, attention_mask=attention_mask, position_ids=positions)
        _same(together[:, 9:] if side == "left" else together[:, :TOKENS], alone, f"logits with {side} padding")

    _as_the_model_does(case, compare)


def packing_keeps_documents_apart(case: Case) -> None:
    """Two documents in one row, with positions that begin anew, have the logits that each has alone."""
    first, second = case.tokens(1, 20), case.tokens(1, 17, seed=1)
    positions = torch.cat((torch.arange(20), torch.arange(17)))[None]

    def compare() -> None:
        packed = case.logits(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False)
        alone = [case.logits(each, use_cache=False) for each in (first, second)]
        _same(packed, torch.cat(alone, dim=1), "logits of packed documents")

    _as_the_model_does(case, compare)


def chunked_prefill_writes_the_same(case: Case) -> None:
    """`generate(prefill_chunk_size=...)` writes what it writes without."""
    tokens = case.tokens(2)

    def compare() -> None:
        if not torch.equal(case.written(tokens, prefill_chunk_size=8), case.written(tokens)):
            raise Broken("tokens written differ with prefill_chunk_size")

    _as_the_model_does(case, compare)


def beams_equal_dense(case: Case) -> None:
    """Beam search with a budget of all tokens writes what the dense model writes."""
    tokens = case.tokens(1, 20)
    wanted = case.written(tokens, num_beams=3)
    with case.attached(top_k=20 + NEW_TOKENS, dense_shortcut=False):
        if not torch.equal(case.written(tokens, num_beams=3), wanted):
            raise Broken("tokens written with beams differ")


def saving_keeps_everything(case: Case) -> None:
    """A saved model loads with `AutoModelForCausalLM`, with the same weights to the last bit and the same logits."""
    if case.family.model_type not in ATTACHABLE:
        raise NotTheModels("only families of the table are saved with their indexers; use dsa.save_indexers")
    tokens = case.tokens(1)
    with case.attached() as model, tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        again.set_experts_implementation("eager")
        with torch.no_grad():
            logits = again(tokens).logits
        weights, loaded = model.state_dict(), again.state_dict()
        lost = [name for name in weights if name not in loaded or not torch.equal(weights[name], loaded[name])]
        if type(again) is not type(model) or lost:
            raise Broken(f"what was loaded again is a {type(again).__name__} with other weights {lost[:3]}")
        _same(logits, case.logits(tokens), "logits of the saved and the loaded model")


def detaching_restores(case: Case) -> None:
    """Attaching and detaching leaves class, configuration, weights' names and logits as they were."""
    tokens, model = case.tokens(1), case.model

    def state() -> tuple[Any, ...]:
        return type(model), type(model.config), list(model.state_dict()), model.config.to_dict()

    before, logits = state(), case.logits(tokens)
    with case.attached():
        case.logits(tokens)
    if state() != before or not torch.equal(case.logits(tokens), logits):
        raise Broken("the model is not what it was before attaching")


def a_training_step_learns(case: Case) -> None:
    """The indexers' loss over dense attention has a finite gradient in every indexer and none in the model."""
    losses: list[torch.Tensor] = []

    def observe(call: AttentionCall) -> None:
        hidden, indexer = call.hidden_states.detach(), indexers[call.layer]
        latent = None if call.query_latent is None else call.query_latent.detach()
        query, weight = indexer.queries(hidden, call.rope, latent)
        loss = indexer_loss(
            query,
            indexer.keys(hidden, call.rope),
            weight,
            call.query.detach(),
            call.key.detach(),
            attention_scale=call.scale,
            key_start=call.key_start,
            key_end=call.key_end,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
        )
        losses.append(loss)

    with case.attached() as model:
        indexers = indexers_of(model)
        model(case.tokens(1), use_cache=False, dsa_context=DSAContext("dense", observe))
        torch.stack(losses).sum().backward()
        own = {name: each for name, each in model.named_parameters() if ".indexer." in name}
        still = [name for name, each in own.items() if each.grad is None or not each.grad.isfinite().all()]
        moved = [name for name, each in model.named_parameters() if name not in own and each.grad is not None]
        model.zero_grad()
    if len(losses) != len(indexers) or still or moved:
        raise Broken(f"indexer weights without a finite gradient: {still}; model weights with one: {moved}")


def masks_are_ranges(case: Case) -> None:
    """Full-attention layers are handed ranges of positions and no mask of `T * S` numbers, padded or not."""
    tokens, seen = case.tokens(2), []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("attention_mask"))

    with case.attached(), _hooked(case, look):
        padded = torch.ones_like(tokens)
        padded[0, :5] = 0
        case.logits(tokens)
        case.logits(tokens, attention_mask=padded)
    whole = [mask for mask in seen if mask is not None and mask.shape[-1] != 2]
    if whole:
        raise Broken(f"a layer is handed a mask {list(whole[0].shape)}, whose memory grows with the square of the text")


@contextmanager
def _hooked(case: Case, look: Callable[..., None]) -> Iterator[None]:
    full = full_attention_layers(case.model.config)
    attentions = [each for each, whole in zip(case.family.attention_layers(case.model), full) if whole]
    hooks = [each.register_forward_pre_hook(look, with_kwargs=True) for each in attentions]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


CLAIMS: dict[str, Callable[[Case], None]] = {
    "all tokens equal dense": all_tokens_equal_dense,
    "sparse equals its reference": sparse_equals_reference,
    "cached equals uncached": cached_equals_uncached,
    "left padding": padding_changes_nothing,
    "packing": packing_keeps_documents_apart,
    "chunked prefill": chunked_prefill_writes_the_same,
    "beams": beams_equal_dense,
    "masks are ranges": masks_are_ranges,
    "one training step": a_training_step_learns,
    "detaching": detaching_restores,
    "save and load": saving_keeps_everything,
}
"""Claims by their names, the one that most depends on the family first."""

IN_FP32 = ("all tokens equal dense", "save and load")
"""The claims to try in fp32. The others are of fp64 models, so that rounding does not blur what they compare."""
