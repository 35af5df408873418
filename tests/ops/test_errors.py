"""What callers get wrong is refused with the argument's name, what was expected and what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsa.ops import QuantizedKeys, dense_attention, index_topk, indexer_loss, quantize_index_keys, sparse_attention
from dsa.ops.types import resolve_impl
from dsa.testing.cases import Case, make_inputs

INPUTS = make_inputs(Case("errors", batch=2, tokens=3, keys=5, heads=4, groups=2, head_dim=8, value_dim=6, top_k=4))
INDEX = {"q": INPUTS.q_index, "k": INPUTS.k_index, "w": INPUTS.w_index, "top_k": 4}
ATTENTION = {"q": INPUTS.q, "k": INPUTS.k, "v": INPUTS.v}
LOSS = {
    "q_index": INPUTS.q_index,
    "k_index": INPUTS.k_index,
    "w_index": INPUTS.w_index,
    "q": INPUTS.q,
    "k": INPUTS.k,
}
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    index_topk: INDEX,
    sparse_attention: {**ATTENTION, "indices": INPUTS.indices},
    dense_attention: ATTENTION,
    indexer_loss: LOSS,
}
RANGE = torch.zeros(2, 3, dtype=torch.int32)
INT8 = quantize_index_keys(INPUTS.k_index)
WRONG = [
    (index_topk, {"q": None}, TypeError, r"q must be a tensor \[B, T, Hi, Di\], got NoneType"),
    (index_topk, {"q": INPUTS.q_index[0]}, ValueError, r"q must be \[B, T, Hi, Di\]"),
    (index_topk, {"q": INPUTS.q_index[..., :0]}, ValueError, "at least one head and one dim"),
    (index_topk, {"q": INPUTS.q_index.int()}, TypeError, "q must be fp64, fp32, bf16 or fp16"),
    (index_topk, {"k": INPUTS.k_index[..., 1:]}, ValueError, r"k must be \[B, S, Di\] = \[2, any, 16\]"),
    (index_topk, {"k": INPUTS.k_index[:1]}, ValueError, r"k must be .*got float32 \[1, 5, 16\]"),
    (index_topk, {"k": INPUTS.k_index.to("meta")}, ValueError, "k must be on cpu"),
    (index_topk, {"k": INT8[:1]}, ValueError, r"k must be \[B, S, Di\] = \[2, any, 16\], got \[1, 5, 16\]"),
    (index_topk, {"k": QuantizedKeys(INT8.data.to("meta"), INT8.scale.to("meta"))}, ValueError, "k must be on cpu"),
    (index_topk, {"k": [1]}, TypeError, "k must be a tensor"),
    (index_topk, {"w": INPUTS.w_index[..., 1:]}, ValueError, r"w must be \[B, T, Hi\]"),
    (index_topk, {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    (index_topk, {"top_k": 4.0}, TypeError, "top_k must be a whole number, got float 4.0"),
    (index_topk, {"top_k": True}, TypeError, "top_k must be a whole number"),
    (index_topk, {"sinks": -1}, ValueError, "sinks must be at least 0"),
    (index_topk, {"local": -1}, ValueError, "local must be at least 0"),
    (index_topk, {"sinks": 2, "local": 3}, ValueError, "sinks=2, local=3, top_k=4; raise top_k or lower local"),
    (index_topk, {"scale": torch.nan}, ValueError, "scale must be finite"),
    (index_topk, {"scale": torch.ones(1)}, TypeError, "scale must be a number or None"),
    (index_topk, {"key_start": RANGE[:, 1:]}, ValueError, r"key_start must be \[B, T\] = \[2, 3\]"),
    (index_topk, {"key_start": RANGE.float()}, TypeError, "key_start must be int32 or int64"),
    (
        index_topk,
        {"key_start": RANGE - 1},
        ValueError,
        r"key_start must lie in \[0, S\] = \[0, 5\], got values from -1",
    ),
    (
        index_topk,
        {"key_end": RANGE + 6},
        ValueError,
        r"key_end must lie in \[0, S\] = \[0, 5\], got values from 6 to 6",
    ),
    (index_topk, {"impl": "fastest"}, ValueError, "impl must be one of auto, reference, .* got 'fastest'"),
    (index_topk, {"impl": "vendor"}, NotImplementedError, "impl='vendor' cannot run this: .* Use .*reference"),
    (sparse_attention, {"q": INPUTS.q[..., 1:]}, ValueError, r"k must be \[B, S, G, D\] = \[2, any, any, 7\]"),
    (sparse_attention, {"q": INPUTS.q[:, :, 1:]}, ValueError, "heads of q must be a multiple of the heads of k"),
    (sparse_attention, {"k": INPUTS.k[:, 1:]}, ValueError, r"v must be \[B, S, G, Dv\] = \[2, 4, 2, any\]"),
    (sparse_attention, {"k": INPUTS.k.double()}, TypeError, "k must not be wider than q"),
    (sparse_attention, {"v": INPUTS.v.double()}, TypeError, "v must not be wider than q"),
    (sparse_attention, {"v": INPUTS.v.to(torch.float8_e4m3fn)}, TypeError, "v must be fp64, fp32, bf16 or fp16"),
    (sparse_attention, {"indices": INPUTS.indices.float()}, TypeError, "indices must be int32 or int64"),
    (sparse_attention, {"indices": INPUTS.indices[:, 1:]}, ValueError, r"indices must be \[B, T, K\] = \[2, 3, any\]"),
    (
        sparse_attention,
        {"indices": INPUTS.indices - 1},
        ValueError,
        r"indices must lie in \[-1, S\) = \[-1, 5\), .* -2",
    ),
    (sparse_attention, {"indices": INPUTS.indices + 4}, ValueError, r"indices must lie in \[-1, S\) = \[-1, 5\)"),
    (sparse_attention, {"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0; pass None"),
    (sparse_attention, {"sink_logits": torch.ones(3)}, ValueError, r"sink_logits must be \[H\] = \[4\]"),
    (sparse_attention, {"impl": "vendor"}, NotImplementedError, "impl='vendor'"),
    (dense_attention, {"k": INPUTS.k[..., None]}, ValueError, r"k must be \[B, S, G, D\]"),
    (dense_attention, {"key_end": RANGE + 6}, ValueError, "key_end must lie in"),
    (dense_attention, {"scale": torch.inf}, ValueError, "scale must be finite"),
    (dense_attention, {"softcap": -1}, ValueError, "softcap must be positive"),
    (dense_attention, {"impl": "vendor"}, NotImplementedError, "impl='vendor'"),
    (indexer_loss, {"q_index": INPUTS.q_index[:, 1:]}, ValueError, r"q_index must be \[B, T, Hi, Di\] = \[2, 3, any"),
    (indexer_loss, {"k_index": INT8}, TypeError, "k_index must be a tensor .* got QuantizedKeys"),
    (indexer_loss, {"k_index": INPUTS.k_index[:, 1:]}, ValueError, r"k_index must be \[B, S, Di\] = \[2, 5, 16\]"),
    (indexer_loss, {"w_index": INPUTS.w_index[:, 1:]}, ValueError, r"w_index must be \[B, T, Hi\]"),
    (indexer_loss, {"q_index": INPUTS.q_index[..., :0]}, ValueError, "at least one head and one dim"),
    (indexer_loss, {"indices": INPUTS.indices + 4}, ValueError, "indices must lie in"),
    (indexer_loss, {"query_mask": RANGE}, ValueError, r"query_mask must be bool \[B, T\] = \[2, 3\] on cpu, got int32"),
    (indexer_loss, {"query_mask": [True]}, ValueError, "query_mask must be bool .* got list"),
    (indexer_loss, {"sinks": -1}, ValueError, "sinks must be at least 0"),
    (indexer_loss, {"index_scale": torch.inf}, ValueError, "index_scale must be finite"),
    (indexer_loss, {"attention_scale": "1"}, TypeError, "attention_scale must be a number or None, got str '1'"),
    (indexer_loss, {"impl": "vendor"}, NotImplementedError, "impl='vendor'"),
]


@pytest.mark.parametrize(
    ("operation", "change", "error", "message"),
    WRONG,
    ids=[f"{call.__name__}-{next(iter(change))}-{number}" for number, (call, change, *_) in enumerate(WRONG)],
)
def test_refused(operation: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        operation(**{**CALLS[operation], **change})
    assert str(raised.value).startswith(operation.__name__)


@pytest.mark.parametrize("operation", CALLS, ids=lambda operation: operation.__name__)
def test_the_calls_are_right_without_the_changes(operation: Callable[..., Any]) -> None:
    operation(**CALLS[operation])


def test_automatic_takes_the_first_that_can() -> None:
    gaps = {"triton": "needs a GPU", "native": None, "reference": None}
    assert resolve_impl("op", "auto", gaps) == "native"
    assert resolve_impl("op", "reference", gaps) == "reference"
    with pytest.raises(
        NotImplementedError, match=r"impl=.triton. cannot run this: needs a GPU\. Use native or reference"
    ):
        resolve_impl("op", "triton", gaps)
    with pytest.raises(NotImplementedError, match="op has no such implementation"):
        resolve_impl("op", "vendor", gaps)
