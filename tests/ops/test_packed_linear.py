"""Products with packed weights: every block format and instruction set against fp64, and GGUF's own decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from dsa.ops import FORMATS, BlockFormat, PackedWeight, pack_blocks, pack_weight, packed_linear, packed_rows
from dsa.ops.packed_linear import api, reference

OPERATIONS = ("packed_linear",)

every_format = pytest.mark.parametrize("name", list(FORMATS))


def random_blocks(format: BlockFormat, rows: int, columns: int) -> torch.Tensor:
    """Blocks whose every bit is random, but for fp16 scales of a useful size."""
    rng = np.random.default_rng(format.number)
    raw = rng.integers(0, 256, (rows, columns // format.columns, format.file_bytes), dtype=np.uint8)
    for at in (208,) if format.name == "Q6_K" else (0, 2) if format.minimum else (0,):
        halves = (0.01 * rng.standard_normal(raw.shape[:2])).astype(np.float16)
        raw[:, :, at : at + 2] = halves[..., None].view(np.uint8)
    return torch.from_numpy(raw).flatten(1)


def packed(name: str, rows: int, columns: int) -> PackedWeight:
    return pack_blocks(random_blocks(FORMATS[name], rows, columns), FORMATS[name], columns)


def numbers(weight: PackedWeight) -> torch.Tensor:
    return packed_rows(weight, torch.arange(weight.rows), impl="reference")


@every_format
@pytest.mark.parametrize("rows", [16, 37])
def test_blocks_are_what_gguf_makes_of_them(impl: str, name: str, rows: int) -> None:
    format = FORMATS[name]
    blocks = random_blocks(format, rows, 512)
    expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(format.number))
    weight = pack_blocks(blocks, format, 512)
    index = torch.tensor([[0, rows - 1], [5, 5]])
    assert torch.equal(packed_rows(weight, index, impl=impl), torch.from_numpy(expected)[index])
    assert torch.equal(reference.dequantize(weight), torch.from_numpy(expected))


@every_format
@pytest.mark.parametrize("shape", [(1, 16, 256), (2, 37, 512), (31, 5, 256), (3, 70, 768)])
def test_products_are_those_of_fp64(impl: str, name: str, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    weight, generator = packed(name, rows, columns), torch.Generator().manual_seed(tokens)
    input, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    exact = packed_linear(input.double(), weight, bias.double(), impl="reference")
    # Of sums of this size; numbers in fp32 are rounded once for each block.
    size = input.abs().double() @ numbers(weight).abs().double().T + bias.abs()
    out = packed_linear(input, weight, bias, impl=impl)
    assert out.dtype == torch.float32
    assert ((out - exact).abs() <= 1e-6 * size).all()
    # And what the rounding of activations loses: half a step of each group's largest.
    largest = input.unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, 1).double()
    lost = 0.51 / 127 * largest @ numbers(weight).abs().double().T
    plain = input.double() @ numbers(weight).double().T + bias
    assert ((out - plain).abs() <= lost + 1e-6 * size).all()


@every_format
def test_a_token_is_the_same_alone_in_a_prompt_and_on_any_number_of_threads(impl: str, name: str) -> None:
    if impl != "native":
        pytest.skip("torch's own products depend on the shape")
    weight = packed(name, 300, 1024)
    input = torch.randn(47, 1024)
    out = packed_linear(input, weight, impl="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(packed_linear(input, weight, impl="native"), out)
    alone = torch.cat([packed_linear(input[t : t + 1], weight, impl="native") for t in range(47)])
    assert torch.equal(alone, out)


def test_many_tokens_pass_in_chunks(impl: str) -> None:
    weight = packed("Q8_0", 16, 8192)
    input = torch.randn(70, 8192)
    out = packed_linear(input, weight, impl=impl)
    torch.testing.assert_close(out, packed_linear(input.double(), weight).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("columns", [1, 31, 76, 160])
def test_numbers_are_rounded_into_blocks_of_any_width(impl: str, format: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    numbers_in = torch.randn(21, columns, generator=generator)
    weight = pack_weight(numbers_in, format)
    padded = torch.nn.functional.pad(numbers_in, (0, -columns % 32), value=0).unflatten(1, (-1, 32))
    span = padded.abs().amax(2) * 2 / 254 if format == "Q8_0" else (padded.amax(2) - padded.amin(2)) / 15
    step = span.repeat_interleave(32, 1)[:, :columns]
    # Half a step, and what fp16 makes of scales and minima.
    assert ((numbers(weight) - numbers_in).abs() <= 0.5 * step + 2e-3 * numbers_in.abs().max()).all()
    input = torch.randn(3, columns, generator=generator)
    expected = packed_linear(input.double(), weight).float()
    torch.testing.assert_close(packed_linear(input, weight, impl=impl), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_were_q4_1_come_back() -> None:
    weight = pack_weight(torch.randn(32, 64), "Q4_1")
    again = pack_weight(numbers(weight), "Q4_1")
    # But for the last place of fp16.
    torch.testing.assert_close(numbers(again), numbers(weight), rtol=2e-3, atol=2e-3)


def test_quants_of_minus_128_do_not_overflow(impl: str) -> None:
    blocks = torch.full((16, 34), 128, dtype=torch.uint8)
    blocks[:, :2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    weight = pack_blocks(blocks, FORMATS["Q8_0"], 32)
    for sign in (1, -1):
        out = packed_linear(torch.full((1, 32), 127.0 * sign), weight, impl=impl)
        assert (out == -128 * 127 * 32 * sign).all()


def test_a_token_that_is_not_finite_harms_no_other(impl: str) -> None:
    weight, input = packed("Q5_K", 20, 512), torch.randn(4, 512)
    clean = packed_linear(input, weight, impl=impl)
    for spoilt in (torch.inf, -torch.inf, torch.nan):
        input[2, 300] = spoilt
        out = packed_linear(input, weight, impl=impl)
        assert out[2].isnan().all()
        torch.testing.assert_close(out[[0, 1, 3]], clean[[0, 1, 3]], rtol=1e-5, atol=1e-5)


def test_tiny_and_large_activations(impl: str) -> None:
    weight = packed("Q4_0", 16, 64)
    for size in (0.0, 1e-42, 1e-31, 1e-25, 1e30):
        input = torch.randn(2, 64) * size
        expected = packed_linear(input.double(), weight).float()
        torch.testing.assert_close(packed_linear(input, weight, impl=impl), expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts_in_memory(impl: str, dtype: torch.dtype) -> None:
    weight = packed("Q4_K", 18, 256)
    input = torch.randn(2, 3, 512).to(dtype)[..., ::2]
    out = packed_linear(input, weight, impl=impl)
    assert (out.dtype, out.shape) == (dtype, (2, 3, 18))
    expected = packed_linear(input.float(), weight, impl="reference")
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-3)
    rows = torch.randn(512, 4).T.to(dtype)[:, :256]
    assert rows.stride(1) != 1
    expected = packed_linear(rows.contiguous(), weight, impl=impl)
    assert torch.equal(packed_linear(rows, weight, impl=impl), expected)


def test_the_gradient_is_that_of_the_plain_product(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_GRADIENT_NUMBERS", 2048)
    weight = packed("Q6_K", 37, 256)
    input, bias = torch.randn(2, 3, 256, requires_grad=True), torch.randn(37, requires_grad=True)
    out = packed_linear(input, weight, bias, impl=impl)
    grad = torch.randn_like(out)
    to_input, to_bias = torch.autograd.grad(out, (input, bias), grad)
    torch.testing.assert_close(to_input, grad @ numbers(weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_bias, grad.sum((0, 1)))


def test_nothing_in_nothing_out(impl: str) -> None:
    weight = packed("Q8_0", 3, 32)
    assert packed_linear(torch.ones(0, 32), weight, impl=impl).shape == (0, 3)
    assert packed_rows(weight, torch.zeros(2, 0, dtype=torch.int64), impl=impl).shape == (2, 0, 32)


def test_names_what_does_not_fit() -> None:
    weight = packed("Q8_0", 3, 32)
    with pytest.raises(ValueError, match=r"packed_linear: input must be \[..., C\] = \[2, 32\], got float32 \[2, 31\]"):
        packed_linear(torch.ones(2, 31), weight)
    with pytest.raises(ValueError, match=r"packed_linear: bias must be \[N\] = \[3\]"):
        packed_linear(torch.ones(2, 32), weight, torch.ones(4))
    with pytest.raises(TypeError, match="packed_linear: input must be fp64, fp32"):
        packed_linear(torch.ones(2, 32, dtype=torch.int32), weight)
    with pytest.raises(NotImplementedError, match=r"the input is fp64. Use reference"):
        packed_linear(torch.ones(2, 32).double(), weight, impl="native")
    for index in (-1, 3, 1 << 40):
        for impl in ("native", "reference"):
            with pytest.raises(IndexError, match=r"index must lie in \[0, 3\)"):
                packed_rows(weight, torch.tensor([0, index]), impl=impl)
    with pytest.raises(ValueError, match="pack_blocks: 64 columns in Q8_0 are 68 bytes a row"):
        pack_blocks(torch.zeros(2, 34, dtype=torch.uint8), FORMATS["Q8_0"], 64)
    with pytest.raises(ValueError, match="columns a multiple of 256 for Q4_K"):
        pack_blocks(torch.zeros(2, 144, dtype=torch.uint8), FORMATS["Q4_K"], 96)
    with pytest.raises(ValueError, match="PackedWeight: panels must be uint8"):
        PackedWeight(torch.zeros(1, 3, dtype=torch.uint8), FORMATS["Q8_0"], 3, 32)
    with pytest.raises(ValueError, match="PackedWeight: columns must be a multiple of 256 for Q6_K"):
        PackedWeight(torch.zeros(1, 3, dtype=torch.uint8), FORMATS["Q6_K"], 3, 32)
    with pytest.raises(ValueError, match="pack_weight: format must be one of Q8_0, Q4_1"):
        pack_weight(torch.ones(2, 2), "Q4_K")
    for number in (torch.nan, torch.inf, 1e6):
        with pytest.raises(ValueError, match="pack_weight: weight must have finite numbers of at most 65504"):
            pack_weight(torch.full((2, 2), number), "Q8_0")
