"""The two copies of a model that take turns: sparse, and as transformers runs it.

A model with full attention is attached; the peer is the same model with torch's dense attention. A model born with DSA
is accelerated; the peer is transformers' own path through it, which scores all pairs of tokens and masks dense
attention. Both are checked against each other, and what is selected against the reference, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa.bench.agreement import ROWS, check_close
from dsa.bench.caches import fits, masked_prefill_bytes
from dsa.bench.measure import Disagreement
from dsa.bench.recording import long_ids
from dsa.bench.settings import Settings
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.decoder import decoder_layers
from dsa.models.default_model import Status
from dsa.models.families import born_with_dsa
from dsa.models.loading import LoadedModel, load_model
from dsa.models.sparse import attach_indexers, sparse_report_of
from dsa.ops import index_topk

TOP_K = 1024
QUICK_BUDGET = {"top_k": 32, "local": 8}
CHECK_TOKENS = 300
LOGIT_ERROR = 1e-3


@dataclass(frozen=True)
class Pair:
    """The sparse model and the plain one, and what was checked of them.

    Args:
        sparse: Attached, or accelerated.
        plain: As transformers runs it.
        checks: What was compared, and how close it came.
        shape: What every row says of the model.
    """

    sparse: LoadedModel
    plain: LoadedModel
    checks: list[str]
    shape: dict[str, Any]

    @property
    def born_with_dsa(self) -> bool:
        """Whether the model was born with DSA."""
        return born_with_dsa(self.plain.model.config)

    def models(self) -> dict[str, Any]:
        """Both, peer first, by the names that rows use."""
        return {"SDPA": self.plain.model, "DSA": self.sparse.model}


def load_pair(settings: Settings, status: Status) -> Pair:
    """Loads the model twice, makes one sparse, and checks that they agree where they must.

    Attached models read `TOP_K` tokens a query, models born with DSA as many as their configuration says.

    Raises:
        Disagreement: They do not.
        OSError: The model cannot be read.
        ValueError: It cannot be attached or accelerated.
    """
    plain = load_model(settings.model, device="cpu", status=status)
    sparse = load_model(settings.model, device="cpu", status=status)
    born = born_with_dsa(plain.model.config)
    status("Comparing with the plain model and with the reference")
    ids = long_ids(sparse.tokenizer, CHECK_TOKENS if not settings.quick else 2 * QUICK_BUDGET["top_k"])
    everything = max(ids.shape[1], 512)
    attach_indexers(sparse, None, top_k=everything, dense_shortcut=False)
    with _reading(plain.model, everything) if born else nullcontext():
        expected = plain.model(ids).logits
    said = [check_close("logits with all selected", sparse.model(ids).logits, expected, LOGIT_ERROR)]
    if born:
        own = plain.model.config.index_topk
        budget = {"top_k": min(own, QUICK_BUDGET["top_k"]) if settings.quick else own}
        _read_few(plain.model, budget["top_k"])
    else:
        budget = QUICK_BUDGET if settings.quick else {"top_k": TOP_K}
    report, _ = attach_indexers(sparse, None, dense_shortcut=True, **budget)
    more = long_ids(sparse.tokenizer, 2 * report.config.top_k)
    said.append(check_selections(sparse.model, more, None))
    if born and fits(masked_prefill_bytes(plain.model.config, more.shape[1])):
        said.append(_same_choices(sparse.model, plain.model, more))
    config = plain.model.config.get_text_config()
    shape = {
        "model": settings.model,
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "dense_layers": report.count("dense"),
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "born_with_dsa": born,
        **{name: getattr(report.config, name) for name in ("top_k", "index_heads", "index_head_dim", "sinks", "local")},
    }
    return Pair(sparse, plain, said, shape)


def check_selections(model: Any, ids: Tensor, cache: Any) -> str:
    """Runs a sparse model and compares what each layer selects for its last queries with the reference.

    Raises:
        Disagreement: A layer selects something else.
    """
    config, compared = sparse_report_of(model).config, 0

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


def _read_few(model: Any, top_k: int) -> None:
    """Sets how many tokens a query of transformers' path reads, in every layer that selects."""
    for layer in decoder_layers(model):
        if getattr(layer.self_attn, "indexer", None) is not None:
            layer.self_attn.indexer.index_topk = top_k


@contextmanager
def _reading(model: Any, top_k: int) -> Iterator[None]:
    """Lets transformers' path read so many tokens a query while the context is open."""
    _read_few(model, top_k)
    try:
        yield
    finally:
        _read_few(model, model.config.index_topk)


def _same_choices(sparse: Any, plain: Any, ids: Tensor) -> str:
    """How often both would write the same token. They may differ where scores lie within rounding of each other."""
    choices = [model(ids).logits.argmax(dim=-1) for model in (sparse, plain)]
    return f"first choice equal at {int((choices[0] == choices[1]).sum()):,} of {ids.shape[1]:,} positions"
