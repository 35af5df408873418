"""FP8 rows of latent attention: the bytes, the way back, and attention over them."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa.ops import PackedLatents, pack_latents, sparse_attention
from dsa.testing.tolerance import assert_within_yardstick

OPERATIONS = ("packed_attention",)


def written_out_row() -> tuple[torch.Tensor, bytearray]:
    """A row of 512 + 64 dims and its 656 bytes, worked out by hand.

    e4m3 has a sign, four bits of exponent with bias 7 and three bits of mantissa; an fp32 scale for every 128 dims
    stands behind the 512 codes, and bf16 is the upper half of an fp32 number. Everything is little-endian.
    """
    row, data = torch.zeros(576), bytearray(656)
    # First group: the largest is 448, so the scale is 1 = 0x3f800000.
    row[0], data[0] = 448.0, 0b0_1111_110  # 1.75 * 2**8
    row[1], data[1] = 1.0, 0b0_0111_000
    row[2], data[2] = -2.5, 0b1_1000_010  # -1.25 * 2**1
    row[3], data[3] = 2.0**-9, 0b0_0000_001  # the smallest there is
    row[4], data[4] = 17.0, 0b0_1011_000  # between 16 and 18, to the even one
    row[127], data[127] = 19.0, 0b0_1011_010  # between 18 and 20, to the even one
    data[512:516] = bytes([0x00, 0x00, 0x80, 0x3F])
    # Second: 896 = 448 * 2, so the scale is 2 = 0x40000000.
    row[128], data[128] = -896.0, 0b1_1111_110
    row[255], data[255] = 3.0, 0b0_0111_100  # 1.5
    data[516:520] = bytes([0x00, 0x00, 0x00, 0x40])
    # Third: nothing but zeros, scale 1.
    data[520:524] = bytes([0x00, 0x00, 0x80, 0x3F])
    # Fourth: 1344 = 448 * 3, so the scale is 3 = 0x40400000.
    row[511], data[511] = 1344.0, 0b0_1111_110
    row[384], data[384] = 6.0, 0b0_1000_000  # 2
    data[524:528] = bytes([0x00, 0x00, 0x40, 0x40])
    # Rotated dims, from byte 528 on.
    row[512], data[528:530] = 1.0, bytes([0x80, 0x3F])
    row[513], data[530:532] = -2.5, bytes([0x20, 0xC0])
    row[514], data[532:534] = 1 + 2.0**-8, bytes([0x80, 0x3F])  # half a step above 1, to the even one
    row[575], data[654:656] = 1 + 3 * 2.0**-8, bytes([0x82, 0x3F])
    return row, data


def test_the_bytes_of_a_written_out_row() -> None:
    row, data = written_out_row()
    packed = pack_latents(row.view(1, 1, 576))
    assert packed.data.shape == (1, 1, 656)
    assert bytes(packed.data[0, 0].tolist()) == bytes(data)


def test_the_numbers_of_a_written_out_row() -> None:
    row, data = written_out_row()
    packed = PackedLatents(torch.tensor(list(data), dtype=torch.uint8).view(1, 1, 656))
    expected = row.clone()
    expected[4], expected[127], expected[514], expected[575] = 16.0, 20.0, 1.0, 1 + 2.0**-6
    assert torch.equal(packed.unpack()[0, 0], expected)
    assert packed.unpack(torch.bfloat16).dtype == torch.bfloat16


def test_scales_that_are_powers_of_two() -> None:
    row, data = written_out_row()
    # 3 becomes 4 = 0x40800000: 1344 / 4 = 336 lies between 320 and 352, to the even one, and 6 / 4 = 1.5.
    data[511], data[384] = 0b0_1111_010, 0b0_0111_100
    data[524:528] = bytes([0x00, 0x00, 0x80, 0x40])
    packed = pack_latents(row.view(1, 1, 576), power_of_two=True)
    assert bytes(packed.data[0, 0].tolist()) == bytes(data)


def e4m3(code: int) -> float:
    """What a byte of e4m3 stands for."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return sign * size


def test_every_code_is_read_as_its_definition_says() -> None:
    data = bytes(range(256)) + struct.pack("<2f", 0.5, 3.0) + struct.pack("<H", 0xBF80)
    packed = PackedLatents(torch.tensor(list(data), dtype=torch.uint8).view(1, 1, -1), latent_dim=256, rope_dim=1)
    expected = [e4m3(code) * (0.5 if code < 128 else 3.0) for code in range(256)] + [-1.0]
    torch.testing.assert_close(packed.unpack()[0, 0], torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


@given(st.integers(1, 300), st.integers(0, 9), st.integers(0, 1 << 20), st.booleans())
def test_other_sizes_keep_three_bits(latent_dim: int, rope_dim: int, seed: int, power_of_two: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 5, latent_dim + rope_dim, generator=generator)
    packed = pack_latents(rows, latent_dim, power_of_two=power_of_two)
    assert packed.shape == rows.shape
    back = packed.unpack()
    error = (back - rows).abs()
    # Half a unit of a three-bit mantissa, or half the smallest step, 2**-9 of a scale of at most twice max / 448.
    largest = rows.abs().amax(dim=-1, keepdim=True)
    assert (error <= torch.maximum(rows.abs() / 16, largest / 448 / 512) * 1.001)[..., :latent_dim].all()
    assert torch.equal(back[..., latent_dim:], rows[..., latent_dim:].bfloat16().float())
    alone = pack_latents(rows[:, 3:4], latent_dim, power_of_two=power_of_two)
    assert torch.equal(alone.data, packed.data[:, 3:4])


def test_what_is_not_finite_stays_in_its_group() -> None:
    rows = torch.ones(1, 3, 576)
    rows[0, 1, 130], rows[0, 2, 300] = torch.nan, torch.inf
    back = pack_latents(rows).unpack()
    assert back[0, 1, 128:256].isnan().all()
    assert back[0, 2, 256:384].isnan().all()
    assert back.isnan().sum() == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_as_fp32(dtype: torch.dtype) -> None:
    rows = torch.randn(1, 5, 160, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(pack_latents(rows, 140).data, pack_latents(rows.float(), 140).data)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (20, 8), (131, 3), (1, 0), (260, 1)])
def test_every_implementation_writes_the_same_bytes(
    latent_dim: int, rope_dim: int, power_of_two: bool, impl: str
) -> None:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(2, 70, latent_dim + rope_dim, generator=generator)
    rows *= torch.exp(8 * torch.randn(2, 70, 1, generator=generator)) * torch.rand(rows.shape, generator=generator) ** 9
    rows[0, 0] = 0.0
    rows[0, 1, 0], rows[0, 2, 0], rows[0, 3, -1], rows[0, 4, -1] = torch.nan, -torch.inf, torch.nan, torch.inf
    # Numbers half-way between two of e4m3, subnormal ones too.
    rows[1, 0, :latent_dim] = torch.tensor([448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]).repeat(103)[:latent_dim]
    rows[1, 1] *= 1e-40
    for x in (rows, rows.bfloat16(), rows.clamp(-6e4, 6e4).half(), rows.mT.contiguous().mT):
        expected = pack_latents(x, latent_dim, power_of_two=power_of_two, impl="reference")
        found = pack_latents(x, latent_dim, power_of_two=power_of_two, impl=impl)
        # Every NaN is as good as another.
        assert torch.equal(found.unpack().isnan(), expected.unpack().isnan())
        rough = expected.unpack().isnan().any(dim=-1)
        assert torch.equal(found.data[~rough], expected.data[~rough])


def test_rows_are_written_into_a_cache_and_sliced_as_views() -> None:
    rows = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(4))
    expected = pack_latents(rows, 30)
    cache = PackedLatents(torch.full((3, 16, expected.data.shape[-1]), 255, dtype=torch.uint8), 30, 10)
    for begin, end in ((0, 4), (4, 10)):
        part = cache[:, begin:end]
        assert pack_latents(rows[:, begin:end], 30, out=part) is part
    assert torch.equal(cache.data[:, :10], expected.data)
    assert (cache.data[:, 10:] == 255).all()
    assert cache[1:, 2:7].data.data_ptr() == cache.data[1, 2].data_ptr()
    assert cache.to("cpu").shape == (3, 16, 40)
    with pytest.raises(TypeError, match="one or two slices"):
        cache[0]  # type: ignore[index]


SHAPES = {
    "deepseek": (2, 5, 300, 4, 512, 64, 70),
    "tiny": (2, 7, 33, 3, 20, 8, 11),
    "odd": (1, 1, 90, 5, 131, 3, 40),
    "no RoPE": (1, 3, 20, 1, 8, 0, 4),
    "one place": (1, 2, 9, 2, 64, 16, 1),
}


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sink": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_over_rows_is_attention_over_what_they_say(
    shape: tuple[int, ...], options: dict[str, float | bool], impl: str
) -> None:
    batch, tokens, keys, heads, latent_dim, rope_dim, places = shape
    generator = torch.Generator().manual_seed(5)
    rows = pack_latents(torch.randn(batch, keys, latent_dim + rope_dim, generator=generator), latent_dim)
    q = torch.randn(batch, tokens, heads, latent_dim + rope_dim, generator=generator)
    indices = torch.randint(-1, keys, (batch, tokens, places), generator=generator, dtype=torch.int32)
    indices[0, -1] = -1
    given_options = {**options}
    sink = torch.randn(heads, generator=generator) if given_options.pop("sink", False) else None
    out, lse = sparse_attention(q, rows, None, indices, sink_logits=sink, impl=impl, **given_options)
    results = []
    for dtype in (torch.float32, torch.float64):
        key = rows.unpack(dtype).unsqueeze(2)
        sinks = None if sink is None else sink.to(dtype)
        results.append(
            sparse_attention(
                q.to(dtype), key, key[..., :latent_dim], indices, sink_logits=sinks, impl="reference", **given_options
            )
        )
    (naive, naive_lse), (exact, exact_lse) = results
    assert_within_yardstick(out, naive, exact, factor=4.0, what="out")
    assert_within_yardstick(lse, naive_lse, exact_lse, factor=4.0, what="lse")
    assert (out[0, -1] == 0).all()
    assert (lse[0, -1] == -torch.inf).all()


def test_errors_average_out_against_what_rows_have_in_common(impl: str) -> None:
    """Beside rows in bf16, over 256 of them whose common part is as large as what differs."""
    generator = torch.Generator().manual_seed(10)
    rows = torch.randn(1, 256, 576, generator=generator) + torch.randn(1, 1, 576, generator=generator)
    q, indices = torch.randn(1, 4, 8, 576, generator=generator) / 4, torch.arange(256).expand(1, 4, 256).int()
    out, _ = sparse_attention(q, pack_latents(rows), None, indices, impl=impl)
    key = rows.bfloat16().unsqueeze(2)
    expected, _ = sparse_attention(q, key, key[..., :512], indices)
    error = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 2e-2


def test_strided_queries_and_rows_of_a_larger_cache(impl: str) -> None:
    generator = torch.Generator().manual_seed(6)
    cache = pack_latents(torch.randn(3, 50, 72, generator=generator), 64)
    part = cache[1:, 7:40]
    q = torch.randn(2, 4, 72, 5, generator=generator).transpose(2, 3)
    indices = torch.randint(0, 33, (2, 4, 9), generator=generator)
    found = sparse_attention(q, part, None, indices, impl=impl)
    plain = PackedLatents(part.data.contiguous(), 64, 8)
    expected = sparse_attention(q.contiguous(), plain, None, indices, impl=impl)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_queries(dtype: torch.dtype, impl: str) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = pack_latents(torch.randn(1, 40, 80, generator=generator), 64)
    q = torch.randn(1, 3, 2, 80, generator=generator).to(dtype)
    indices = torch.arange(40).expand(1, 3, 40)
    out, lse = sparse_attention(q, rows, None, indices, impl=impl)
    wide, wide_lse = sparse_attention(q.float(), rows, None, indices, impl=impl)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide.to(dtype))
    torch.testing.assert_close(lse, wide_lse)


def test_tokens_that_are_not_selected_are_not_read(impl: str) -> None:
    rows = torch.randn(1, 20, 40, generator=torch.Generator().manual_seed(8))
    rows[0, 11:] = torch.nan
    packed = pack_latents(rows, 32)
    q, indices = torch.ones(1, 2, 1, 40), torch.tensor([[[0, 3, -1], [10, -1, -1]]])
    out, lse = sparse_attention(q, packed, None, indices, impl=impl)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    bad, _ = sparse_attention(q, packed, None, torch.tensor([[[0, 3, 12], [10, -1, -1]]]), impl=impl)
    assert bad[0, 0].isnan().all()
    assert bad[0, 1].isfinite().all()


def test_nothing_to_read(impl: str) -> None:
    packed = pack_latents(torch.zeros(1, 0, 40), 32)
    out, lse = sparse_attention(torch.ones(1, 2, 3, 40), packed, None, torch.full((1, 2, 4), -1), impl=impl)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (
        sparse_attention(torch.ones(1, 0, 3, 40), packed, None, torch.zeros(1, 0, 4).int(), impl=impl)[0].numel() == 0
    )


def test_an_index_outside_is_refused(impl: str) -> None:
    packed = pack_latents(torch.zeros(1, 10, 40), 32)
    for wrong in (10, -2, 1 << 30):
        with pytest.raises(ValueError, match=r"indices must lie in \[-1, S\) = \[-1, 10\)"):
            sparse_attention(torch.ones(1, 1, 3, 40), packed, None, torch.tensor([[[0, wrong]]]), impl=impl)


def test_a_backward_pass_ends_in_a_message(impl: str) -> None:
    packed = pack_latents(torch.zeros(1, 4, 40), 32)
    q = torch.ones(1, 1, 3, 40, requires_grad=True)
    out, _ = sparse_attention(q, packed, None, torch.zeros(1, 1, 2).int(), impl=impl)
    with pytest.raises(NotImplementedError, match="FP8 rows pass no gradient"):
        out.sum().backward()


ROWS = pack_latents(torch.ones(2, 5, 40), 32)
QUERY, INDICES = torch.ones(2, 3, 4, 40), torch.zeros(2, 3, 4, dtype=torch.int32)


class TestRefusals:
    def test_rows_of_another_length_or_dtype(self) -> None:
        with pytest.raises(ValueError, match=r"rows of 656 bytes .*got uint8 \[1, 2, 584\].*another version"):
            PackedLatents(torch.zeros(1, 2, 584, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"3 dims and rows of 656 bytes"):
            PackedLatents(torch.zeros(2, 656, dtype=torch.uint8))
        with pytest.raises(TypeError, match=r"uint8 .*got float8_e4m3fn \[1, 2, 656\].*\.view\(torch\.uint8\)"):
            PackedLatents(torch.zeros(1, 2, 656).to(torch.float8_e4m3fn))
        with pytest.raises(ValueError, match="latent_dim must be at least 1"):
            PackedLatents(torch.zeros(1, 2, 4, dtype=torch.uint8), 0, 2)

    def test_packing(self) -> None:
        with pytest.raises(ValueError, match=r"pack_latents: rows must have at least latent_dim=512 dims"):
            pack_latents(torch.ones(1, 2, 40))
        with pytest.raises(ValueError, match=r"rows must be \[B, S, L \+ R\]"):
            pack_latents(torch.ones(2, 40), 32)
        with pytest.raises(TypeError, match="rows must be fp64"):
            pack_latents(torch.ones(1, 2, 40).int(), 32)
        with pytest.raises(ValueError, match=r"out must be \[2, 5, 40\] with latent_dim=30"):
            pack_latents(torch.ones(2, 5, 40), 30, out=ROWS)
        with pytest.raises(NotImplementedError, match="impl='vendor'"):
            pack_latents(torch.ones(1, 2, 40), 32, impl="vendor")

    def test_attention(self) -> None:
        with pytest.raises(ValueError, match=r"q must be \[B, T, H, L \+ R\] = \[2, any, any, 40\]"):
            sparse_attention(QUERY[..., 1:], ROWS, None, INDICES)
        with pytest.raises(TypeError, match="v must be None where k is PackedLatents"):
            sparse_attention(QUERY, ROWS, torch.ones(2, 5, 1, 32), INDICES)
        with pytest.raises(TypeError, match=r"v must be a tensor .* unless k is PackedLatents"):
            sparse_attention(QUERY, torch.ones(2, 5, 1, 40), None, INDICES)
        with pytest.raises(ValueError, match=r"indices must be \[B, T, K\] = \[2, 3, any\]"):
            sparse_attention(QUERY, ROWS, None, INDICES[:, 1:])
        with pytest.raises(ValueError, match=r"sink_logits must be \[H\] = \[4\]"):
            sparse_attention(QUERY, ROWS, None, INDICES, sink_logits=torch.ones(3))
        with pytest.raises(ValueError, match="softcap must be positive"):
            sparse_attention(QUERY, ROWS, None, INDICES, softcap=0.0)
        with pytest.raises(ValueError, match="at least one head"):
            sparse_attention(QUERY[:, :, :0], ROWS, None, INDICES)
        with pytest.raises(NotImplementedError, match="impl='vendor'"):
            sparse_attention(QUERY, ROWS, None, INDICES, impl="vendor")
