"""What is appended to caches in one kernel each: FP8 rows, and index keys out of projected ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsa.ops import IndexWeights, PackedLatents, QuantizedKeys, index_projection, pack_latents
from dsa.ops.index_projection import Rope, rope_tables
from dsa.ops.index_projection import triton as projection
from dsa.ops.packed_latents import triton as packing

# The interpreter computes with NumPy, which warns of the rows that are there for that.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (20, 8), (131, 3), (1, 0), (260, 1)])
def test_rows_have_the_bytes_of_the_reference(latent_dim: int, rope_dim: int, power_of_two: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(2, 11, latent_dim + rope_dim, generator=generator)
    rows *= torch.exp(8 * torch.randn(2, 11, 1, generator=generator)) * torch.rand(rows.shape, generator=generator) ** 9
    rows[0, 0] = 0.0
    rows[0, 1, 0], rows[0, 2, 0], rows[0, 3, -1], rows[0, 4, -1] = torch.nan, -torch.inf, torch.nan, torch.inf
    # Numbers half-way between two of e4m3, subnormal ones too, and subnormal scales.
    rows[1, 0, :latent_dim] = torch.tensor([448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]).repeat(103)[:latent_dim]
    rows[1, 1] *= 1e-40
    # The interpreter misreads subnormal bf16 numbers.
    narrow = rows.bfloat16()
    narrow[1, 1] = 1.0
    for x in (rows, narrow, rows.mT.contiguous().mT):
        expected = pack_latents(x, latent_dim, power_of_two=power_of_two, impl="reference")
        found = pack_latents(x.to(device), latent_dim, power_of_two=power_of_two, impl="triton").to("cpu")
        # Every NaN is as good as another.
        assert torch.equal(found.unpack().isnan(), expected.unpack().isnan())
        rough = expected.unpack().isnan().any(dim=-1)
        assert torch.equal(found.data[~rough], expected.data[~rough])


def test_rows_are_written_into_a_cache(device: str) -> None:
    rows = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(4)).to(device)
    cache = PackedLatents(torch.full((3, 16, 54), 255, dtype=torch.uint8, device=device), 30, 10)
    for begin, end in ((0, 4), (4, 10), (10, 10)):
        part = cache[:, begin:end]
        assert pack_latents(rows[:, begin:end], 30, out=part, impl="triton") is part
    assert torch.equal(cache.data[:, :10].cpu(), pack_latents(rows.cpu(), 30, impl="reference").data)
    assert (cache.data[:, 10:] == 255).all()


def test_packing_compiles_into_one_graph(device: str) -> None:
    rows = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(4)).to(device)
    compiled = torch.compile(lambda x: pack_latents(x * 2, 32, impl="triton").data, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), pack_latents(rows * 2, 32, impl="triton").data)
    data = torch.zeros(1, 3, 52, dtype=torch.uint8, device=device)
    torch.library.opcheck(packing._write_rows, (rows, data, 32, False))


Sizes = tuple[int, int, int, int, int, int]
"""`B, T, C, Hi, Di, R`."""

SIZES: list[Sizes] = [(1, 1, 40, 4, 32, 32), (2, 3, 19, 3, 24, 10), (1, 1, 5, 1, 1, 0), (3, 1, 30, 2, 64, 2)]
BEGIN = 4


def make(sizes: Sizes, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, IndexWeights, Rope | None]:
    batch, tokens, width, heads, dim, rotated = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = ((heads * dim, width), (dim, width), (heads, width), (dim,), (dim,))
    weights = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    # Every second hidden state: its rows do not follow each other in memory.
    hidden = torch.randn(batch, 2 * tokens, width, generator=generator).to(device, dtype)[:, ::2]
    angles = torch.randn(batch if rotated != 2 else 1, tokens, rotated // 2, generator=generator).to(device)
    return hidden, IndexWeights(*weights), rope_tables(angles.cos(), angles.sin()) if rotated else None


def storage(sizes: Sizes, form: str, device: str) -> Tensor | QuantizedKeys:
    batch, tokens, _, _, dim, _ = sizes
    if form == "fp32":
        return torch.full((batch, tokens + 9, dim), 7.0, device=device)
    data = torch.full((batch, tokens + 9, dim), 7.0).to(torch.int8 if form == "int8" else torch.float8_e4m3fn)
    return QuantizedKeys(data.to(device), torch.full((batch, tokens + 9), 7.0, device=device))


def numbers(keys: Tensor | QuantizedKeys) -> Tensor:
    return keys.dequantize() if isinstance(keys, QuantizedKeys) else keys


@pytest.mark.parametrize("form", ["int8", "fp8", "fp32"])
@pytest.mark.parametrize("sizes", SIZES)
def test_keys_are_those_of_the_reference(sizes: Sizes, form: str, device: str) -> None:
    hidden, weights, rope = make(sizes, device)
    found: list[tuple[Tensor, Any]] = []
    for impl in ("reference", "triton"):
        keys = storage(sizes, form, device)
        made = index_projection(hidden, weights, rope, keys, BEGIN, impl=impl)
        found.append((numbers(keys), made))
    (expected, made_expected), (actual, made_actual) = found
    # A number whose value lies close to a half may be rounded to the next one: a step is 1/127 or 1/16 of it.
    step = {"int8": 1 / 100, "fp8": 1 / 8, "fp32": 1e-5}[form]
    error = (actual - expected).abs()
    assert (error <= step * expected.abs().amax(dim=-1, keepdim=True) + 1e-6).all()
    assert (error > 1e-5 * expected.abs().amax()).float().mean() < 0.02
    for beside in (slice(0, BEGIN), slice(BEGIN + sizes[1], None)):
        assert torch.equal(actual[:, beside], expected[:, beside])
    for a, e in zip(made_actual, made_expected):
        torch.testing.assert_close(a, e)


def test_16_bit_models_and_no_queries(device: str) -> None:
    sizes = SIZES[0]
    hidden, weights, rope = make(sizes, device, torch.bfloat16)
    keys, wide = storage(sizes, "fp32", device), storage(sizes, "fp32", device)
    assert index_projection(hidden, weights, rope, keys, BEGIN, queries=False, impl="triton") is None
    exact = IndexWeights(*(x.float() for x in weights.tensors))
    index_projection(hidden.float(), exact, rope, wide, BEGIN, impl="reference")
    torch.testing.assert_close(numbers(keys), numbers(wide), atol=0.05, rtol=0.02)
    nothing = hidden[:, :0]
    assert index_projection(nothing, weights, None, keys, BEGIN, impl="triton")[0].shape == (1, 0, 4, 32)  # type: ignore[index]


def test_appending_compiles_into_one_graph(device: str) -> None:
    sizes = SIZES[1]
    hidden, weights, rope = make(sizes, device)

    def append(hidden: Tensor, keys: QuantizedKeys) -> Tensor:
        made = index_projection(hidden, weights, rope, keys, BEGIN, impl="triton")
        assert made is not None
        return made[0] * 2

    caches = [storage(sizes, "int8", device) for _ in range(2)]
    compiled = torch.compile(append, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, caches[0]), append(hidden, caches[1]))
    # The graph multiplies in another order: a key close to a half may be rounded to the next step.
    torch.testing.assert_close(numbers(caches[0]), numbers(caches[1]), atol=0.03, rtol=0)


def test_is_one_operator(device: str) -> None:
    _, weights, rope = make(SIZES[1], device)
    assert rope is not None
    key, norm, bias = torch.ones(2, 3, 24, device=device), *weights.tensors[3:]
    data, scale = torch.zeros(2, 3, 24, dtype=torch.int8, device=device), torch.zeros(2, 3, device=device)
    torch.library.opcheck(projection._append, (key, norm, bias, *rope, data, scale))
    torch.library.opcheck(projection._append, (key, norm, bias, None, None, key.clone(), None))
