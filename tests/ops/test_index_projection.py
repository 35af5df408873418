"""Index queries, weights and keys of a few tokens: the kernel on every instruction set, and the module it replaces."""

from typing import Any

import pytest
import torch

from dsa.config import DSAConfig
from dsa.modules import Indexer
from dsa.ops import IndexWeights, QuantizedKeys, index_projection, native_support, quantize_index_keys
from dsa.ops.index_projection import FEW_TOKENS, Rope, rope_tables

OPERATIONS = ("index_projection",)

Sizes = tuple[int, int, int, int, int, int]
"""`B, T, C, Hi, Di, R`."""

SIZES: list[Sizes] = [(1, 1, 576, 4, 32, 32), (2, 3, 77, 3, 24, 10), (1, 1, 5, 1, 1, 0), (3, 1, 130, 8, 64, 2)]


def indexer_of(sizes: Sizes) -> Indexer:
    _, _, width, heads, dim, rotated = sizes
    torch.manual_seed(sum(sizes))
    indexer = Indexer(width, DSAConfig(index_heads=heads, index_head_dim=dim, index_rope_dim=rotated))
    torch.nn.init.normal_(indexer.k_norm.weight)
    torch.nn.init.normal_(indexer.k_norm.bias)
    return indexer


def weights_of(indexer: Indexer) -> IndexWeights:
    weights = indexer.plain_weights()
    assert weights is not None
    return weights


def inputs(sizes: Sizes) -> tuple[torch.Tensor, Rope | None]:
    batch, tokens, width, _, _, rotated = sizes
    # Every second hidden state: its rows do not follow each other in memory.
    hidden = torch.randn(batch, 2 * tokens, width)[:, ::2]
    angles = torch.randn(batch if rotated != 2 else 1, tokens, rotated // 2)
    return hidden, rope_tables(angles.cos(), angles.sin()) if rotated else None


BEGIN = 4


def storage(sizes: Sizes, dtype: str) -> torch.Tensor | QuantizedKeys:
    """A cache of some more tokens, filled with what nobody should read."""
    batch, tokens, _, _, dim, _ = sizes
    if dtype == "fp32":
        return torch.full((batch, tokens + 9, dim), torch.nan)
    return QuantizedKeys(
        torch.full((batch, tokens + 9, dim), 99, dtype=torch.int8), torch.full((batch, tokens + 9), torch.nan)
    )


def project(
    sizes: Sizes, dtype: str, hidden: torch.Tensor, weights: IndexWeights, rope: Rope | None, **options: Any
) -> tuple[Any, tuple[torch.Tensor, torch.Tensor] | None]:
    """The keys as they were written into `storage`, and nothing beside them; the queries and head weights."""
    keys, end = storage(sizes, dtype), BEGIN + sizes[1]
    made = index_projection(hidden, weights, rope, keys, BEGIN, **options)
    for beside in (keys[:, :BEGIN], keys[:, end:]):
        assert bool((beside.scale if isinstance(beside, QuantizedKeys) else beside).isnan().all())
        assert not isinstance(beside, QuantizedKeys) or bool((beside.data == 99).all())
    return keys[:, BEGIN:end], made


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "fp32"])
@pytest.mark.parametrize("sizes", SIZES)
def test_is_what_the_module_computes(impl: str, sizes: Sizes, dtype: str, queries: bool) -> None:
    indexer = indexer_of(sizes)
    hidden, rope = inputs(sizes)
    expected, _ = project(sizes, dtype, hidden, weights_of(indexer), rope, impl="reference")
    out, made = project(sizes, dtype, hidden, weights_of(indexer), rope, queries=queries, impl=impl)
    with torch.no_grad():
        query, key, weight = indexer(hidden, rope)
    if dtype == "fp32":
        torch.testing.assert_close(out, key, atol=2e-5, rtol=0)
    else:
        torch.testing.assert_close(out.scale, expected.scale, atol=0, rtol=2e-6)
        assert (out.data.int() - expected.data.int()).abs().max() <= 1
        assert (out.data != expected.data).float().mean() < 0.02
    assert (made is not None) == queries
    if made is not None:
        torch.testing.assert_close(made[0], query, atol=2e-5, rtol=0)
        torch.testing.assert_close(made[1], weight, atol=2e-5, rtol=0)
        assert not made[0].requires_grad


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_does_not_depend_on_the_number_of_threads(impl: str, threads: int) -> None:
    indexer, (hidden, rope) = indexer_of(SIZES[0]), inputs(SIZES[0])
    results = []
    for number in (1, threads):
        torch.set_num_threads(number)
        out, made = project(SIZES[0], "fp32", hidden, weights_of(indexer), rope, impl=impl)
        assert made is not None
        results.append((out, *made))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=0 if impl == "native" else 1e-5, rtol=0)


def test_a_token_that_is_not_finite_harms_no_other(impl: str) -> None:
    sizes = (1, 3, 20, 2, 8, 8)
    indexer, (hidden, rope) = indexer_of(sizes), inputs(sizes)
    clean, _ = project(sizes, "int8", hidden, weights_of(indexer), rope, impl=impl)
    hidden = hidden.clone()
    hidden[0, 1, 3] = torch.inf
    keys = storage(sizes, "int8")
    assert isinstance(keys, QuantizedKeys)
    index_projection(hidden, weights_of(indexer), rope, keys, BEGIN, impl=impl)
    spoilt = keys[:, BEGIN : BEGIN + 3]
    assert spoilt.scale.isnan().tolist() == [[False, True, False]]
    assert torch.equal(spoilt.data[:, ::2], clean.data[:, ::2])
    assert (spoilt.data[:, 1] == 0).all()


def test_keys_in_e4m3() -> None:
    sizes = SIZES[1]
    indexer, (hidden, rope) = indexer_of(sizes), inputs(sizes)
    ints = storage(sizes, "int8")
    assert isinstance(ints, QuantizedKeys)
    out = QuantizedKeys(torch.zeros(ints.shape).to(torch.float8_e4m3fn), ints.scale)
    index_projection(hidden, weights_of(indexer), rope, out, BEGIN)
    with torch.no_grad():
        expected = quantize_index_keys(indexer.keys(hidden, rope), "fp8")
    end = BEGIN + sizes[1]
    torch.testing.assert_close(out[:, BEGIN:end].scale, expected.scale, atol=0, rtol=2e-6)
    torch.testing.assert_close(out[:, BEGIN:end].dequantize(), expected.dequantize(), atol=0, rtol=0.13)
    with pytest.raises(NotImplementedError, match="index keys in int8 or fp32"):
        index_projection(hidden, weights_of(indexer), rope, out, BEGIN, impl="native")


def test_many_tokens_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(native_support, "call", lambda name, arguments: called.append(name))
    monkeypatch.setattr(native_support, "gap", lambda *tensors: None)
    sizes = (1, FEW_TOKENS + 1, 16, 2, 8, 8)
    indexer, (hidden, rope) = indexer_of(sizes), inputs(sizes)
    index_projection(hidden, weights_of(indexer), rope, storage(sizes, "fp32"))
    assert called == []
    index_projection(hidden[:, 1:], weights_of(indexer), None, storage(sizes, "fp32"))
    assert called == ["index_projection"]


def test_names_what_does_not_fit() -> None:
    sizes = SIZES[1]
    indexer, (hidden, rope) = indexer_of(sizes), inputs(sizes)
    weights, out = weights_of(indexer), storage(sizes, "fp32")
    with pytest.raises(ValueError, match="IndexWeights: they must be"):
        IndexWeights(*weights.tensors[:3], torch.ones(5), torch.ones(5))
    with pytest.raises(ValueError, match="index_projection: hidden must be"):
        index_projection(hidden[..., 1:], weights, rope, out)
    with pytest.raises(ValueError, match="index_projection: rope must be"):
        index_projection(hidden, weights, rope_tables(torch.ones(2, 3, 13), torch.ones(2, 3, 13)), out)
    with pytest.raises(ValueError, match="index_projection: rope must be"):
        index_projection(hidden[:, 1:], weights, rope, out)
    with pytest.raises(ValueError, match="index_projection: out must be"):
        index_projection(hidden, weights, None, out[..., 1:])
    for begin in (-1, 10):
        with pytest.raises(ValueError, match=f"index_projection: out must be .* got .* begin={begin}"):
            index_projection(hidden, weights, None, out, begin)
    half = IndexWeights(*(weight.bfloat16() for weight in weights.tensors))
    with pytest.raises(NotImplementedError, match=r"weights that are fp32 and dense. Use reference"):
        index_projection(hidden.bfloat16(), half, None, out, impl="native")


def test_the_module_is_not_passed_over() -> None:
    indexer = indexer_of(SIZES[1])
    assert indexer.plain_weights() is not None
    handle = indexer.wk.register_forward_hook(lambda *seen: None)
    assert indexer.plain_weights() is None
    handle.remove()
    indexer.wq = torch.nn.Sequential(indexer.wq)
    assert indexer.plain_weights() is None


def test_weights_that_were_exchanged_are_noticed(impl: str) -> None:
    indexer, (hidden, rope) = indexer_of(SIZES[0]), inputs(SIZES[0])
    weights = indexer.weights_for(7)
    assert weights is not None
    assert indexer.weights_for(7) is weights
    project(SIZES[0], "fp32", hidden, weights, rope, impl=impl)
    indexer.to(torch.bfloat16).to(torch.float32)
    indexer.wk.weight.data = torch.randn_like(indexer.wk.weight)
    out, _ = project(SIZES[0], "fp32", hidden, weights, rope, impl=impl)
    with torch.no_grad():
        torch.testing.assert_close(out, indexer.keys(hidden, rope), atol=2e-5, rtol=0)


def test_strides_of_dims_without_neighbours_do_not_matter(impl: str) -> None:
    """Found by the fuzzer: a hidden size of one, and no tokens at all."""
    weights = IndexWeights(torch.ones(2, 1), torch.ones(2, 1), torch.ones(1, 1), torch.ones(2), torch.zeros(2))
    hidden = torch.ones(1, 1, 2)[..., ::2]
    assert hidden.stride(-1) == 2
    for tokens in (1, 0):
        made = index_projection(hidden[:, :tokens], weights, None, torch.zeros(1, 3, 2), impl=impl)
        assert made is not None
        assert made[0].shape == (1, tokens, 1, 2)
        assert (made[0] == 1).all()


@pytest.mark.skipif(native_support.missing() is not None, reason="the compiled kernels are missing")
def test_the_kernel_says_which_tensor_has_gaps_in_its_rows() -> None:
    indexer, (hidden, rope) = indexer_of(SIZES[1]), inputs(SIZES[1])
    wide = hidden.repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(NotImplementedError, match=r"hidden has strides \[\d+, \d+, 2\]"):
        index_projection(wide, weights_of(indexer), rope, storage(SIZES[1], "fp32"), impl="native")
