"""Every figure of an evaluation, computed a second time with plain transformers and torch.

The model runs with eager attention and `n x n` masks; nothing of `dsa` computes here. Only the index tensors of the
indexers (queries, keys, weights) are taken from the run, to score and select with them anew.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dsa import LayerConfig
from dsa.eval.evaluation import Evaluation, evaluate
from dsa.models import attach, detach
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.loading import LoadedModel, load_model
from dsa.runs.inputs import Document, read_document

SINKS = 4


@dataclass
class Plain:
    """The plain model with eager attention, and how a text is read with it."""

    model: Any
    ids: torch.Tensor
    start: int
    attentions: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def perplexity(self, selected: list[torch.Tensor] | None = None) -> float:
        """With causal attention, or only to the tokens in `selected`, one bool `[n, n]` per layer."""
        with self._only(selected):
            output = self.model(self.ids, output_attentions=True, use_cache=False)
        self.attentions = [attention[0].double() for attention in output.attentions]
        logits = output.logits[0, self.start : -1].double()
        return math.exp(F.cross_entropy(logits, self.ids[0, self.start + 1 :]))

    @contextmanager
    def _only(self, selected: list[torch.Tensor] | None) -> Iterator[None]:
        hooks = []
        for layer, chosen in zip(self.model.model.layers, selected or [], strict=False):
            mask = torch.zeros(chosen.shape, dtype=self.model.dtype).masked_fill(~chosen, float("-inf"))[None, None]

            def hook(module: Any, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
                return args, {**kwargs, "attention_mask": mask}

            hooks.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mass(self, selected: list[torch.Tensor]) -> float:
        """Share of the last forward's attention on `selected`, for the layers but the first; mean over everything."""
        shares = [
            attention.masked_fill(~chosen, 0.0).sum(dim=-1)[:, self.start :].mean()
            for attention, chosen in zip(self.attentions[1:], selected, strict=True)
        ]
        return float(torch.stack(shares).mean())


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def window(tokens: int, top_k: int) -> torch.Tensor:
    """The first 4 tokens and the `top_k - 4` most recent ones."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    return causal(tokens) & ((key < SINKS) | (query - key < top_k - SINKS))


def best(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The `top_k` visible tokens with the highest scores `[n, n]`, the most recent of equals."""
    visible = causal(len(scores))
    recent_first = scores.masked_fill(~visible, float("-inf")).flip(1)
    order = recent_first.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(visible).scatter(1, len(scores) - 1 - order, True) & visible


def indexer_selection(call: AttentionCall, top_k: int, local: int) -> torch.Tensor:
    """Eq. 1 on one layer's index tensors, sinks and local tokens forced.

    Summed in fp32 head by head, as the operation promises: other sums order near-equal scores otherwise.
    """
    index_query, index_key, index_weight = call.index_query, call.index_key, call.index_weight
    assert index_query is not None
    assert isinstance(index_key, torch.Tensor)
    assert index_weight is not None
    weight = index_weight[0] * index_query.shape[-1] ** -0.5
    scores = torch.zeros(index_query.shape[1], index_query.shape[1])
    for head in range(index_query.shape[2]):
        dots = index_query[0, :, head].double() @ index_key[0].double().T
        scores += dots.float().relu() * weight[:, head, None]
    query, key = torch.arange(len(scores))[:, None], torch.arange(len(scores))
    return best(scores.masked_fill((key < SINKS) | (query - key < local), float("inf")), top_k)


def index_calls(model: Any, ids: torch.Tensor, mode: str, **options: Any) -> list[AttentionCall]:
    """What an observer sees of every layer."""
    calls: list[AttentionCall] = []
    attach(model, **options)
    with torch.no_grad():
        model(ids, use_cache=False, dsa_context=DSAContext(mode=mode, observer=calls.append))  # type: ignore[arg-type]
    detach(model)
    return calls


def compare(loaded: LoadedModel, document: Document, tokens: int, top_k: int, local: int, tolerance: float) -> None:
    # fp32 index keys, so that scoring anew needs no quantisation; a seed, so that attaching twice gives one indexer
    dense_layer = {0: LayerConfig(dense=True)}
    options = {"top_k": top_k, "local": local, "index_dtype": "fp32", "layers": dense_layer}
    eager = copy.deepcopy(loaded.model)
    eager.set_attn_implementation("eager")
    torch.manual_seed(3)
    result: Evaluation = evaluate(loaded, document, tokens=tokens, new_tokens=8, **options)
    ids = torch.tensor([loaded.tokenizer(document.text)["input_ids"][: tokens - 8]])
    plain = Plain(eager, ids, tokens // 2)
    size, layers = ids.shape[1], loaded.model.config.num_hidden_layers

    torch.manual_seed(3)
    calls = index_calls(loaded.model, ids, "sparse", **options)
    own = [causal(size), *(indexer_selection(call, top_k, local) for call in calls)]
    assert result.dsa.perplexity == pytest.approx(plain.perplexity(own), abs=tolerance)

    windows = [causal(size), *[window(size, top_k)] * (layers - 1)]
    assert result.window.perplexity == pytest.approx(plain.perplexity(windows), abs=tolerance)

    assert result.dense.perplexity == pytest.approx(plain.perplexity(), abs=tolerance)
    torch.manual_seed(3)
    calls = index_calls(loaded.model, ids, "dense", **options)
    assert [call.layer for call in calls] == list(range(1, layers))
    own = [indexer_selection(call, top_k, local) for call in calls]
    oracle = [best(attention.sum(dim=0), top_k) for attention in plain.attentions[1:]]
    assert result.mass("dsa") == pytest.approx(plain.mass(own), abs=1e-4)
    assert result.mass("window") == pytest.approx(plain.mass(windows[1:]), abs=1e-4)
    assert result.mass("oracle") == pytest.approx(plain.mass(oracle), abs=1e-4)


def test_tiny(tiny: LoadedModel, document: Document) -> None:
    # its perplexities are near 500, not near 10: the same relative tolerance as below
    compare(tiny, document, tokens=200, top_k=32, local=8, tolerance=5e-3)


@pytest.mark.default_model
def test_default_model() -> None:
    # untrained indexers are as good for this, and known by their seed
    loaded = dataclasses.replace(load_model(device="cpu"), is_default=False)
    compare(loaded, read_document(), tokens=256, top_k=64, local=16, tolerance=1e-4)
