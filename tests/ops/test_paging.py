"""Caches in pages: where bytes lie, the way there and back, and operations over them."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa.ops import (
    PackedLatents,
    PagedKeys,
    PagedLatents,
    index_topk,
    pack_latents,
    physical_indices,
    quantize_index_keys,
    sparse_attention,
)
from dsa.ops.quantize.types import QuantizedKeys

OPERATIONS = ("packed_attention",)

TABLE = torch.tensor([[7, 2], [0, 8]], dtype=torch.int32)
"""Two sequences of up to 128 tokens in a pool of nine pages."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paged_latents(tokens: int = 100) -> tuple[PagedLatents, PackedLatents]:
    rows = pack_latents(numbers(2, tokens, 576))
    paged = PagedLatents(torch.full((9, 64, 656), 255, dtype=torch.uint8), TABLE, tokens)
    paged.write(rows)
    return paged, rows


def paged_keys(dtype: str, tokens: int = 100) -> tuple[PagedKeys, QuantizedKeys]:
    keys = quantize_index_keys(numbers(2, tokens, 128), dtype)  # type: ignore[arg-type]
    paged = PagedKeys(torch.full((9, 64, 132), 255, dtype=torch.uint8), TABLE, tokens, dtype)  # type: ignore[arg-type]
    paged.write(keys)
    return paged, keys


def test_where_the_bytes_of_a_row_lie() -> None:
    paged, rows = paged_latents()
    # Token 70 is token 6 of the second block: page 2 of the first sequence, page 8 of the second.
    pool = paged.pages.flatten()
    for batch, page in enumerate((2, 8)):
        begin = page * 64 * 656 + 6 * 656
        assert torch.equal(pool[begin : begin + 656], rows.data[batch, 70])
    # Blocks end at 100 tokens, and other pages are left alone.
    assert (paged.pages[7] != 255).any(dim=-1).all()
    assert (paged.pages[2, 36:] == 255).all()
    assert (paged.pages[[1, 3, 4, 5, 6]] == 255).all()


def test_where_the_bytes_of_an_index_key_lie() -> None:
    """A page of 64 keys of 128 dims: 8,192 bytes of data, then 64 scales of four bytes each."""
    data = torch.zeros(1, 70, 128, dtype=torch.int8)
    scale = torch.ones(1, 70)
    data[0, 66, 0], data[0, 66, 127], scale[0, 66] = 5, -3, 0.75
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    paged = PagedKeys(torch.zeros(3, 64, 132, dtype=torch.uint8), table, 70, "int8")
    paged.write(QuantizedKeys(data, scale))
    page = bytes(paged.pages[1].flatten().tolist())  # token 66 is token 2 of the second block
    expected = bytearray(64 * 132)
    expected[2 * 128], expected[2 * 128 + 127] = 5, 256 - 3
    for token in range(6):
        at = 8192 + 4 * token
        expected[at : at + 4] = struct.pack("<f", 0.75 if token == 2 else 1.0)
    assert page == bytes(expected)
    assert struct.unpack_from("<f", bytes(paged.pages[2].flatten().tolist()), 8192 + 4 * 63) == (1.0,)


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 1 << 20))
def test_rows_and_keys_come_back(block: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block)
    pages = torch.randperm(2 * blocks + 3, generator=generator)
    table = pages[: 2 * blocks].view(2, blocks).int()
    # A row that is longer than needed ends in what is no page.
    table = torch.cat((table, torch.full((2, 1), -1, dtype=torch.int32)), dim=1)
    cut = int(torch.randint(0, tokens + 1, (1,), generator=generator))
    rows = pack_latents(torch.randn(2, tokens, 28, generator=generator), 20)
    latents = PagedLatents(torch.zeros(len(pages), block, rows.data.shape[-1], dtype=torch.uint8), table, tokens, 20, 8)
    latents.write(rows[:, :cut])
    latents.write(rows[:, cut:], cut)
    assert torch.equal(latents.gather().data, rows.data)
    for dtype in ("fp8", "int8"):
        keys = quantize_index_keys(torch.randn(2, tokens, 16, generator=generator), dtype)
        paged = PagedKeys(torch.zeros(len(pages), block, 20, dtype=torch.uint8), table, tokens, dtype)
        paged.write(keys[:, :cut])
        paged.write(keys[:, cut:], cut)
        back = paged.gather()
        assert back.dtype == dtype
        assert torch.equal(back.data.view(torch.uint8), keys.data.view(torch.uint8))
        assert torch.equal(back.scale, keys.scale)


def test_physical_indices() -> None:
    indices = torch.tensor([[[0, 63, 64, -1]], [[127, 5, -1, -1]]])
    found = physical_indices(indices, TABLE, pages=9)
    assert found.dtype == torch.int32
    assert found.tolist() == [[[7 * 64, 7 * 64 + 63, 2 * 64, -1]], [[8 * 64 + 63, 5, -1, -1]]]
    assert physical_indices(indices % 3, TABLE, pages=9, block=3).tolist() == [[[21, 21, 22, 23]], [[1, 2, 2, 2]]]
    assert physical_indices(indices[:, :0], TABLE, pages=9).shape == (2, 0, 4)


def test_attention_over_pages_is_attention_over_rows(impl: str) -> None:
    paged, rows = paged_latents()
    q = numbers(2, 5, 3, 576, seed=1)
    indices = torch.randint(-1, 100, (2, 5, 17), generator=torch.Generator().manual_seed(2))
    found, expected = (sparse_attention(q, k, None, indices, impl=impl) for k in (paged, rows))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_selection_over_pages_is_selection_over_keys(dtype: str) -> None:
    paged, keys = paged_keys(dtype)
    q, w = numbers(2, 4, 8, 128, seed=3), numbers(2, 4, 8, seed=4)
    end = torch.tensor([[97, 98, 99, 100], [40, 41, 42, 43]])
    for given_range in ({}, {"key_end": end}):
        found, expected = (index_topk(q, k, w, 20, sinks=2, local=5, **given_range) for k in (paged, keys))
        assert torch.equal(found, expected)


class TestRefusals:
    def test_entries_that_are_no_pages(self) -> None:
        """Before anything is read: neither the pool nor the table is asked for more than it has."""
        paged, rows = paged_latents()
        q = torch.ones(2, 1, 1, 576)
        for wrong in (-1, 9, 1 << 30):
            table = TABLE.clone()
            table[1, 1] = wrong
            broken = PagedLatents(paged.pages, table, 100)
            near, far = torch.tensor([[[3, 70]], [[3, 63]]]), torch.tensor([[[3, 70]], [[3, 64]]])
            sparse_attention(q, broken, None, near)  # does not need that entry
            message = rf"must lie in \[0, P\) = \[0, 9\), got values from .*{wrong}"
            with pytest.raises(ValueError, match=message):
                sparse_attention(q, broken, None, far)
            with pytest.raises(ValueError, match=message):
                broken.gather()
            with pytest.raises(ValueError, match=message):
                broken.write(rows)
            keys, _ = paged_keys("fp8")
            with pytest.raises(ValueError, match=message):
                index_topk(torch.ones(2, 1, 1, 128), PagedKeys(keys.pages, table, 100), torch.ones(2, 1, 1), 4)

    def test_indices_outside(self) -> None:
        paged, _ = paged_latents()
        for wrong in (100, -2):
            with pytest.raises(ValueError, match=r"indices must lie in \[-1, S\) = \[-1, 100\)"):
                sparse_attention(torch.ones(2, 1, 1, 576), paged, None, torch.full((2, 1, 1), wrong))
        with pytest.raises(ValueError, match=r"indices must lie in \[-1, S\) = \[-1, 128\)"):
            physical_indices(torch.full((2, 1, 1), 128), TABLE, pages=9)
        with pytest.raises(ValueError, match="a row for each of 1 batch rows"):
            physical_indices(torch.zeros(1, 1, 1, dtype=torch.int32), TABLE, pages=9)

    def test_tables_and_pages(self) -> None:
        pages = torch.zeros(9, 64, 656, dtype=torch.uint8)
        with pytest.raises(TypeError, match=r"block_table must be int32 \[B, N\], got int64 \[2, 2\]"):
            PagedLatents(pages, TABLE.long())
        with pytest.raises(ValueError, match=r"block_table must be \[B, N\]"):
            PagedLatents(pages, TABLE[0])
        with pytest.raises(ValueError, match="block_table is on meta, pages on cpu"):
            PagedLatents(pages, TABLE.to("meta"))
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, N \* block\] = \[0, 2 \* 64\], got 129"):
            PagedLatents(pages, TABLE, 129)
        with pytest.raises(TypeError, match=r"pages must be uint8 \[P, block, row_bytes\], got float32"):
            PagedLatents(pages.float(), TABLE)
        with pytest.raises(ValueError, match=r"pages must be \[P, block, row_bytes\]"):
            PagedLatents(pages[:, :, None], TABLE)
        with pytest.raises(ValueError, match="rows of 656 bytes"):
            PagedLatents(pages[..., :584], TABLE)
        with pytest.raises(ValueError, match="must follow each other"):
            PagedLatents(pages[:, :32], TABLE)
        with pytest.raises(ValueError, match="dtype must be 'fp8' or 'int8'"):
            PagedKeys(torch.zeros(9, 64, 132, dtype=torch.uint8), TABLE, dtype="int4")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="leaves no byte for a key"):
            PagedKeys(torch.zeros(9, 64, 4, dtype=torch.uint8), TABLE)
        with pytest.raises(ValueError, match="contiguous"):
            PagedKeys(torch.zeros(9, 64, 264, dtype=torch.uint8)[..., ::2], TABLE)
        with pytest.raises(ValueError, match=r"block \* Di a multiple of 4"):
            PagedKeys(torch.zeros(9, 3, 9, dtype=torch.uint8), TABLE)

    def test_what_does_not_fit_the_pages(self) -> None:
        paged, rows = paged_latents()
        with pytest.raises(ValueError, match=r"rows must be \[2, any, 512 \+ 64\] like the pages"):
            paged.write(rows[:1])
        with pytest.raises(ValueError, match="tokens 1 to 101 do not fit, there is room for 100"):
            paged.write(rows, 1)
        keys, own = paged_keys("fp8")
        with pytest.raises(ValueError, match=r"keys must be fp8 \[2, any, 128\] like the pages, got int8"):
            keys.write(quantize_index_keys(torch.ones(2, 3, 128)))
        with pytest.raises(ValueError, match="do not fit"):
            keys.write(own, 64)
        with pytest.raises(ValueError, match=r"k must be \[B, S, Di\] = \[2, any, 64\], got \[2, 100, 128\]"):
            index_topk(torch.ones(2, 1, 1, 64), keys, torch.ones(2, 1, 1), 4)
