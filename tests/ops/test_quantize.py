"""Rotation and eight-bit keys and queries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa.ops import QuantizedKeys, hadamard_transform, quantize_index_keys, quantize_index_queries


def sylvester(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix by its recursion."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


@pytest.mark.parametrize("size", [1, 2, 4, 32, 128])
def test_hadamard_is_the_sylvester_matrix_and_its_own_inverse(size: int) -> None:
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(hadamard_transform(x), x @ sylvester(size))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)


def test_hadamard_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.ones(2, 24))


@pytest.mark.parametrize("size", [1, 24, 32, 64])
def test_int8_keys_are_within_half_a_step(size: int) -> None:
    k = torch.randn(2, 9, size, generator=torch.Generator().manual_seed(0))
    keys = quantize_index_keys(k)
    rotated = hadamard_transform(k) if size != 24 else k
    assert keys.data.dtype == torch.int8
    assert keys.dtype == "int8"
    assert keys.data.abs().amax() == 127
    torch.testing.assert_close(keys.scale, rotated.abs().amax(dim=-1) / 127)
    assert ((keys.dequantize() - rotated).abs() <= 0.5001 * keys.scale.unsqueeze(-1)).all()


def test_rounding_is_half_to_even() -> None:
    # 24 dims are not rotated and the largest makes the scale 1.
    k = torch.zeros(1, 1, 24)
    k[0, 0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0])
    assert quantize_index_keys(k).data[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 3]
    q = torch.zeros(1, 1, 1, 24)
    q[0, 0, 0, :4] = torch.tensor([63.0, 0.5, -1.5, 2.5])
    assert quantize_index_queries(q)[0][0, 0, 0, :4].tolist() == [63, 0, -2, 2]


def test_queries_have_a_scale_per_head() -> None:
    q = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 1e3, 0])[:, None]
    data, scale = quantize_index_queries(q)
    assert data.dtype == torch.int8
    assert scale.shape == (2, 3, 4)
    assert (data[:, :, :3].abs().amax(dim=-1) == 63).all()
    assert (data[:, :, 3] == 0).all()
    assert (scale[:, :, 3] == 1).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_zero_tiny_and_unknown_rows(dtype: str) -> None:
    k = torch.zeros(1, 4, 8)
    k[0, 1, 3], k[0, 2, 0], k[0, 3, 7] = 1e-45, torch.nan, -torch.inf
    keys = quantize_index_keys(k, dtype)
    assert keys.scale[0, :2].tolist() == [1.0, 1.0]
    assert keys.scale[0, 2:].isnan().all()
    assert (keys.data.float() == 0).all()


def test_fp8_keys_keep_three_bits() -> None:
    k = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    keys = quantize_index_keys(k, "fp8")
    rotated = hadamard_transform(k)
    assert keys.dtype == "fp8"
    assert keys.data.float().abs().amax() == 448
    error = (keys.dequantize() - rotated).abs()
    # Half a unit of a three-bit mantissa, or half the smallest subnormal step, 2**-9.
    assert (error <= torch.maximum(rotated.abs() / 16, keys.scale.unsqueeze(-1) / 1000) * 1.001).all()


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 127), ("fp8", 448)])
def test_scales_that_are_powers_of_two(dtype: str, levels: int) -> None:
    # 24 dims are not rotated, so the largest is what is given.
    largest = torch.tensor([1.0, 1.0001, 2.0, 3.0, 0.75, 4.0, 2.0**-60, 0.0]) * levels
    k = torch.zeros(1, 8, 24)
    k[0, :, 5] = -largest
    keys = quantize_index_keys(k, dtype, power_of_two=True)
    assert keys.scale.tolist() == [[1.0, 2.0, 2.0, 4.0, 1.0, 4.0, 2.0**-60, 1.0]]
    k[0, 0, 0], k[0, 1, 0] = torch.nan, torch.inf
    assert quantize_index_keys(k, dtype, power_of_two=True).scale[0, :2].isnan().all()
    with pytest.raises(NotImplementedError, match="powers of two"):
        quantize_index_keys(k, dtype, power_of_two=True, impl="native")


def test_slices_are_views() -> None:
    keys = quantize_index_keys(torch.randn(3, 10, 16))
    part = keys[1:, 2:7]
    assert part.shape == (2, 5, 16)
    assert part.data.data_ptr() == keys.data[1, 2].data_ptr()
    assert part.scale.data_ptr() == keys.scale[1, 2:].data_ptr()
    assert keys[:1].shape == (1, 10, 16)
    assert keys.to("cpu").device == torch.device("cpu")
    for wrong in (0, (slice(None), 3), (slice(None),) * 3):
        with pytest.raises(TypeError, match="one or two slices"):
            keys[wrong]


def test_other_tensors_are_refused() -> None:
    data, scale = torch.zeros(1, 2, 4, dtype=torch.int8), torch.ones(1, 2)
    with pytest.raises(TypeError, match="int8 or float8"):
        QuantizedKeys(data.int(), scale)
    with pytest.raises(TypeError, match="scale float32"):
        QuantizedKeys(data, scale.double())
    with pytest.raises(ValueError, match=r"\[B, S, Di\]"):
        QuantizedKeys(data, scale[:, :1])
    with pytest.raises(ValueError, match="'int8' or 'fp8'"):
        quantize_index_keys(torch.zeros(1, 2, 4), "int4")
    with pytest.raises(ValueError, match="at least one dim"):
        quantize_index_keys(torch.zeros(1, 2, 0))
    with pytest.raises(TypeError, match="convert it"):
        quantize_index_queries(torch.zeros(1, 2, 3, 4, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_as_fp32(dtype: torch.dtype) -> None:
    k = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    keys, plain = quantize_index_keys(k), quantize_index_keys(k.float())
    assert torch.equal(keys.data, plain.data)
    assert torch.equal(keys.scale, plain.scale)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1 << 20))
def test_rows_do_not_depend_on_their_neighbours(tokens: int, size: int, seed: int) -> None:
    k = torch.randn(2, tokens, size, generator=torch.Generator().manual_seed(seed))
    keys = quantize_index_keys(k)
    for t in range(tokens):
        alone = quantize_index_keys(k.mT.contiguous().mT[:, t : t + 1])
        assert torch.equal(alone.data, keys.data[:, t : t + 1])
        assert torch.equal(alone.scale, keys.scale[:, t : t + 1])
