"""What only the compiled `index_topk` has to show: long rows, guessed thresholds, packed tiles, any strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa.ops import QuantizedKeys, index_topk, native_support, quantize_index_keys

pytestmark = pytest.mark.skipif(native_support.missing() is not None, reason="the kernels were not built")

KEYS = 12_000

on_every_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.isa(isa))
        for isa in (() if native_support.missing() else native_support.isas())
    ],
)


def both(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The selections of the kernel and of the reference."""
    native, reference = (index_topk(*arguments, **options, impl=impl) for impl in ("native", "reference"))
    return native, reference


def make(tokens: int, keys: int, dim: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, tokens, 4, dim), (1, keys, dim), (1, tokens, 4))
    q, k, w = (torch.randn(size, generator=generator) for size in sizes)
    return q, k, w


@on_every_isa
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("top_k", [40, 900, 5000])
def test_long_rows(isa: str, tokens: int, top_k: int) -> None:
    q, k, w = make(tokens, KEYS)
    native, reference = both(q, quantize_index_keys(k), w, top_k, sinks=4, local=16)
    assert torch.equal(native, reference)


@on_every_isa
@pytest.mark.parametrize("spacing", range(8, 14))
def test_a_sample_that_misleads(isa: str, spacing: int) -> None:
    """Every `spacing`-th key is far better than the rest: a sample at that distance sees only such keys."""
    q, k, w = make(40, KEYS)
    q, w = q.abs(), w.abs()
    k = -k.abs()
    k[:, (KEYS - 1) % spacing :: spacing] *= -1
    keys = quantize_index_keys(k)
    assert torch.equal(*both(q, keys, w, 600, sinks=1, local=3))
    assert torch.equal(*both(q, keys, -w, 600, sinks=1, local=3))


def test_equal_scores_over_many_tiles() -> None:
    q, k, w = make(40, KEYS)
    assert torch.equal(*both(q, quantize_index_keys(torch.ones_like(k)), w, 700))
    nothing = QuantizedKeys(torch.zeros(1, KEYS, 32, dtype=torch.int8), torch.full((1, KEYS), torch.nan))
    assert torch.equal(*both(q, nothing, w, 700))


@on_every_isa
def test_the_best_scores_are_mostly_zero(isa: str) -> None:
    """The threshold guessed from a sample is the zero that many keys share."""
    q, k, w = make(40, KEYS)
    w = -w.abs()
    w[:, ::2, 0] *= -0.01
    assert torch.equal(*both(q, quantize_index_keys(k), w, 700, sinks=1, local=3))


def test_scores_in_order_and_in_reverse() -> None:
    """Rising with age or falling with it: every key is a candidate, or none after the first."""
    q, _, w = make(40, KEYS)
    q, w = q.abs(), w.abs()
    slope = torch.linspace(1, 100, KEYS).view(1, KEYS, 1).expand(1, KEYS, 24)
    for k in (slope, slope.flip(1)):
        assert torch.equal(*both(q[..., :24], quantize_index_keys(k), w, 500))


@given(data=st.data())
def test_any_strides_and_offsets(data: st.DataObject) -> None:
    batch, tokens, keys = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    heads, dim = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 8, 32, 40, 64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))

    def strided(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A view with an offset and gaps into a larger tensor whose dims may lie in another order."""
        order = data.draw(st.permutations(range(len(size))))
        gaps = [data.draw(st.integers(1, 2)) for _ in size]
        offset = [data.draw(st.integers(0, 2)) for _ in size]
        larger = torch.randn([size[d] * gaps[d] + offset[d] for d in order], generator=generator).to(dtype)
        back = larger.permute([order.index(d) for d in range(len(size))])
        return back[tuple(slice(offset[d], offset[d] + size[d] * gaps[d], gaps[d]) for d in range(len(size)))]

    q, k, w = strided(batch, tokens, heads, dim), strided(batch, keys, dim), strided(batch, tokens, heads)
    quantized = quantize_index_keys(k)
    data_view = strided(batch, keys, dim, dtype=torch.int8)
    data_view.copy_(quantized.data)
    scale_view = strided(batch, keys)
    scale_view.copy_(quantized.scale)
    top_k = data.draw(st.integers(1, 50))
    sinks = data.draw(st.integers(0, top_k))
    local = data.draw(st.integers(0, top_k - sinks))
    assert torch.equal(*both(q, QuantizedKeys(data_view, scale_view), w, top_k, sinks=sinks, local=local))


def gathered(tokens: int, keys: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `make`, with products that come from a few dims, as in a trained indexer, and some keys unlike all others.

    Bounds leave most keys of such a text out, where there are enough of them and of queries.
    """
    q, k, w = make(tokens, keys, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    shrink = torch.cat([torch.ones(5), torch.full((dim - 5,), 0.05)])
    q, k = (x * shrink @ turn for x in (q, k))
    k[:, ::997] *= 3
    k[:, 5::1499] = torch.randn(dim, generator=generator)
    w[:, 7] = -w[:, 7].abs()
    w[:, 11, 2] = torch.nan
    q[:, 13] = 0
    q[:, 17] *= 1e-20
    q[:, 19, 1] = torch.inf
    return q, k, w


@on_every_isa
@pytest.mark.parametrize("form", ["int8", "fp8", "fp32", "bf16"])
def test_bounds_leave_the_selection_alone(isa: str, form: str) -> None:
    tokens, dim = 2400, 32
    q, k, w = gathered(tokens, KEYS, dim, seed=3)
    k[:, 100] = torch.nan
    k[:, 101] = 0
    k[:, 102] *= 1e-20
    keys: QuantizedKeys | torch.Tensor
    if form in ("int8", "fp8"):
        keys = quantize_index_keys(k, dtype=form)
        keys.scale[:, 103] = torch.nan
        keys.scale[:, 104] *= -1
    else:
        keys = k.to({"fp32": torch.float32, "bf16": torch.bfloat16}[form])
    whole = index_topk(q, keys, w, 300, sinks=2, local=20, impl="native")
    # Forty queries are too few for bounds.
    for begin in range(0, tokens, 40):
        stop = KEYS - tokens + begin + 40
        few = index_topk(
            q[:, begin : begin + 40], keys[:, :stop], w[:, begin : begin + 40], 300, sinks=2, local=20, impl="native"
        )
        assert torch.equal(whole[:, begin : begin + 40], few)


def test_bounds_with_documents_side_by_side() -> None:
    q, k, w = gathered(2400, KEYS, 32, seed=4)
    start = torch.arange(2400).div(600, rounding_mode="floor").mul(2500).expand(1, -1)
    assert torch.equal(*both(q, quantize_index_keys(k), w, 200, local=30, key_start=start, key_end=start + 2400))


def test_what_the_kernel_lacks_is_said() -> None:
    q, k, w = make(3, 9)
    with pytest.raises(NotImplementedError, match="float64 has no CPU kernel"):
        index_topk(q.double(), k.double(), w.double(), 4, impl="native")
