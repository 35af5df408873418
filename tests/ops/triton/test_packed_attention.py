"""Attention over FP8 rows in Triton, in one piece and in pages, against attention over what the rows say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsa.ops import PackedLatents, PagedLatents, pack_latents, sparse_attention
from dsa.ops.sparse_attention import triton_packed as kernels
from dsa.testing.tolerance import assert_within_yardstick

SHAPES = {
    # batch, tokens, keys, heads, latent dims, rotated dims, places
    "deepseek": (1, 1, 40, 4, 512, 64, 21),
    "several blocks of heads": (1, 2, 33, 20, 20, 8, 11),
    "odd": (2, 1, 30, 5, 132, 2, 40),
    "no RoPE": (1, 3, 20, 1, 8, 0, 4),
    "one place": (1, 2, 9, 2, 64, 16, 1),
}
SMALLEST = {"BLOCK_HEADS": 16, "BLOCK_KEYS": 16, "STAGES": 1, "num_warps": 4}

# The interpreter computes with NumPy, which warns of rows with NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def make(shape: tuple[int, ...], device: str) -> tuple[Tensor, PackedLatents, Tensor]:
    batch, tokens, keys, heads, latent_dim, rope_dim, places = shape
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(batch, keys, latent_dim + rope_dim, generator=generator)
    q = torch.randn(batch, tokens, heads, latent_dim + rope_dim, generator=generator)
    indices = torch.randint(-1, keys, (batch, tokens, places), generator=generator, dtype=torch.int32)
    return q.to(device), pack_latents(rows, latent_dim, impl="reference").to(device), indices.to(device)


def in_pages(rows: PackedLatents, block: int) -> PagedLatents:
    """The rows in pages that lie in another order; unused entries of the table are -1."""
    batch, keys, _ = rows.shape
    used = -(-keys // block)
    order = torch.randperm(batch * used, generator=torch.Generator().manual_seed(3)).int().view(batch, used)
    table = torch.cat((order, torch.full((batch, 1), -1, dtype=torch.int32)), dim=1).to(rows.device)
    pages = torch.full((batch * used, block, rows.data.shape[-1]), 255, dtype=torch.uint8, device=rows.device)
    paged = PagedLatents(pages, table, keys, rows.latent_dim, rows.rope_dim)
    paged.write(rows)
    return paged


def attend(q: Tensor, rows: PackedLatents | PagedLatents, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return sparse_attention(q, rows, None, indices, impl="triton", **options)


def assert_attends(
    result: tuple[Tensor, Tensor], q: Tensor, rows: PackedLatents, indices: Tensor, **options: Any
) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        key = rows.unpack(dtype).unsqueeze(2)
        wide = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in options.items()}
        value = key[..., : rows.latent_dim]
        found.append(sparse_attention(q.to(dtype), key, value, indices, impl="reference", **wide))
    for what, actual, naive, exact in zip(("out", "lse"), result, *found):
        assert_within_yardstick(actual, naive, exact, factor=4.0, what=what)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "sink": True, "scale": 0.3}], ids=["plain", "options"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_over_what_the_rows_say(shape: tuple[int, ...], options: dict[str, Any], device: str) -> None:
    q, rows, indices = make(shape, device)
    indices[0, -1] = -1
    given = {name: x for name, x in options.items() if name != "sink"}
    if options.get("sink"):
        given["sink_logits"] = torch.randn(shape[3], generator=torch.Generator().manual_seed(1)).to(device)
    result = attend(q, rows, indices, **given)
    assert_attends(result, q, rows, indices, **given)
    assert (result[0][0, -1] == 0).all()
    assert (result[1][0, -1] == -torch.inf).all()
    # Pages change nothing, not even the last bit.
    for x, y in zip(attend(q, in_pages(rows, 4), indices, **given), result):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_queries(dtype: torch.dtype, device: str) -> None:
    q, rows, indices = make(SHAPES["several blocks of heads"], device)
    # Weights times these scales are too small for fp16's exponent.
    rows = PackedLatents(rows.data.clone(), rows.latent_dim, rows.rope_dim)
    end = rows.latent_dim + 4
    rows.data[..., rows.latent_dim : end].view(torch.float32).mul_(1e-3)
    q = q.to(dtype)
    out, lse = attend(q, rows, indices)
    assert out.dtype == dtype
    wide, wide_lse = attend(q.float(), rows, indices)
    torch.testing.assert_close(out.float(), wide, rtol=4 * torch.finfo(dtype).eps, atol=4e-3 * wide.abs().max().item())
    torch.testing.assert_close(lse, wide_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("paged", [False, True])
def test_splits(splits: int, paged: bool, device: str) -> None:
    q, rows, indices = make((1, 2, 70, 3, 20, 8, 60), device)
    indices[0, 0, 16:] = -1
    data, table, page = rows.data, None, 0
    if paged:
        pages = in_pages(rows, 8)
        data, table, page = pages.pages.flatten(0, 1), pages.block_table, 8
    sinks = torch.ones(3, device=device)
    result = kernels.forward(q, data, table, indices, sinks, 70, page, 20, 0.3, None, splits, SMALLEST)
    assert_attends(result, q, rows, indices, scale=0.3, sink_logits=sinks)


def test_every_code_is_read_as_its_definition_says(device: str) -> None:
    data = torch.zeros(1, 1, 256 + 8, dtype=torch.uint8)
    data[0, 0, :256] = torch.arange(256)
    data[0, 0, 256:].view(torch.float32).copy_(torch.tensor([0.5, 3.0]))
    rows = PackedLatents(data.to(device), 256, 0)
    q = torch.zeros(1, 1, 1, 256, device=device)
    out, _ = attend(q, rows, torch.zeros(1, 1, 1, dtype=torch.int32, device=device))
    assert out.isnan().all()
    data[data == 0x7F] = data[data == 0xFF] = 0
    rows = PackedLatents(data.to(device), 256, 0)
    out, _ = attend(q, rows, torch.zeros(1, 1, 1, dtype=torch.int32, device=device))
    assert torch.equal(out[0, 0, 0], rows.unpack()[0, 0])


def test_strided_queries_and_rows_of_a_larger_cache(device: str) -> None:
    q, rows, indices = make((3, 2, 30, 2, 64, 8, 9), device)
    part = rows[1:, 7:]
    indices = indices[1:].clamp_max(22).long()
    strided = q[1:].transpose(2, 3).contiguous().transpose(2, 3)
    found = attend(strided, part, indices)
    plain = PackedLatents(part.data.contiguous(), 64, 8)
    for x, y in zip(found, attend(strided.contiguous(), plain, indices)):
        assert torch.equal(x, y)
    # Rows that do not begin at multiples of four bytes are brought there first.
    shifted = torch.zeros(*part.data.shape[:2], part.data.shape[-1] + 1, dtype=torch.uint8, device=device)[..., 1:]
    shifted.copy_(part.data)
    assert torch.equal(attend(strided, PackedLatents(shifted, 64, 8), indices)[0], found[0])


def test_nothing_outside_is_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, rows, indices = make(SHAPES["one place"], device)
    q, indices = q.expand(1, 2, 2, 80), torch.tensor([[[0, 9, -7, 1 << 30], [3, 1, -1, 2]]], device=device)
    kept = indices.masked_fill((indices < 0) | (indices >= 9), -1)
    assert_attends(attend(q, rows, indices), q, rows, kept)
    # The page of tokens 0 to 3 is outside the pool.
    paged = in_pages(rows, 4)
    paged.block_table[0, 0] = 3
    assert_attends(attend(q, paged, kept), q, rows, kept.masked_fill(kept < 4, -1))
    monkeypatch.setenv("DSA_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match="indices must lie in"):
        attend(q, rows, indices)
    with pytest.raises(ValueError, match=r"block_table entries .* must lie in"):
        attend(q, paged, kept)


def test_tokens_that_are_not_selected_are_not_read(device: str) -> None:
    rows = torch.randn(1, 20, 40, generator=torch.Generator().manual_seed(8))
    rows[0, 11:] = torch.nan
    packed = pack_latents(rows, 32, impl="reference").to(device)
    q = torch.ones(1, 2, 1, 40, device=device)
    out, lse = attend(q, packed, torch.tensor([[[0, 3, -1], [10, -1, -1]]], device=device))
    assert out.isfinite().all()
    assert lse.isfinite().all()
    bad, _ = attend(q, packed, torch.tensor([[[0, 3, 12], [10, -1, -1]]], device=device))
    assert bad[0, 0].isnan().all()
    assert bad[0, 1].isfinite().all()


def test_nothing_to_read(device: str) -> None:
    q, rows, indices = make(SHAPES["one place"], device)
    for keys, queries, places in ((0, 2, 4), (9, 0, 4), (9, 2, 0)):
        out, lse = attend(q[:, :queries], rows[:, :keys], indices[:, :queries].expand(1, queries, 1)[..., :places])
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_a_backward_pass_ends_in_a_message(device: str) -> None:
    q, rows, indices = make(SHAPES["one place"], device)
    out, _ = attend(q.requires_grad_(), rows, indices)
    with pytest.raises(NotImplementedError, match="FP8 rows pass no gradient"):
        out.sum().backward()


def test_rows_that_the_kernel_cannot_read(device: str) -> None:
    q, rows, indices = make((1, 1, 5, 2, 131, 3, 4), device)
    with pytest.raises(NotImplementedError, match=r"multiples of four bytes, got 145 bytes.*Use .*reference"):
        attend(q, rows, indices)


def test_is_one_operator(device: str) -> None:
    q, rows, indices = make(SHAPES["one place"], device)
    paged = in_pages(rows, 4)
    pool = paged.pages.flatten(0, 1)
    torch.library.opcheck(kernels._packed, (q, pool, paged.block_table, indices, None, 9, 4, 64, 0.3, None))


@pytest.mark.parametrize("paged", [False, True])
def test_compiles_into_one_graph(paged: bool, device: str) -> None:
    q, rows, indices = make(SHAPES["one place"], device)
    source = in_pages(rows, 4) if paged else rows
    compiled = torch.compile(lambda q, i: attend(q, source, i)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, indices), attend(q, source, indices)[0])
