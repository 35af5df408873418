"""Small PDFs that would cost much: refused before they do, and what only looks like one is read."""

import random
import zlib
from pathlib import Path

import pytest

from dsa.documents import read_source
from dsa.documents.pdf_bounds import _lzw, shared, too_large
from dsa.documents.pdf_page import page_text
from dsa.testing.hostile_pdfs import BOMBS, SHARERS, boxes, lzw, pdf, words


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb(name: str) -> None:
    assert too_large(BOMBS[name]())


@pytest.mark.parametrize("drawing", [words(5_000), boxes(60_000)], ids=["words", "boxes"])
def test_many_pages_of_one_drawing(tmp_path: Path, drawing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.documents.pdf_bounds._UNSUSPECTED", 1 << 15)
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf(b"/Filter/FlateDecode", zlib.compress(drawing), SHARERS))
    read: list[int] = []
    monkeypatch.setattr("dsa.documents.pdf.page_text", lambda page, form: read.append(1) or page_text(page, form))
    with pytest.raises(ValueError, match=r"pages of .*a\.pdf draw far more than .* many share one; choose fewer"):
        read_source(file)
    assert len(read) < 60


def test_pages_that_share_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf(b"/Filter/FlateDecode", zlib.compress(words(20)), 50))
    assert len(read_source(tmp_path / "a.pdf").pages) == 50
    assert not shared(500_000, 2_000_000, 0)


@pytest.mark.parametrize("shade", [b"\xff", b"\0", b"A", b" "])
def test_an_empty_picture_is_no_bomb(shade: bytes) -> None:
    picture = b"/Subtype/Image/Width 4000/Height 4000/BitsPerComponent 8/Filter"
    assert not too_large(pdf(picture + b"/FlateDecode", zlib.compress(shade * 16_000_000)))
    assert not too_large(pdf(picture + b"/LZWDecode", lzw(shade * 700_000)))


def test_a_packed_page_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf(b"/Filter/LZWDecode", lzw(words(3_000))))
    assert "w2999" in read_source(tmp_path / "a.pdf").text


@pytest.mark.parametrize("data", [b"a" * 9_000, words(8_000), random.Random(0).randbytes(60_000)])
def test_lzw_unpacks_what_was_packed(data: bytes) -> None:
    """Half of it is a damaged stream."""
    packed = lzw(data)
    assert _lzw(packed, 1 << 30, True) == data
    assert len(_lzw(packed, 100, True)) < 100 + 4096
    assert data.startswith(_lzw(packed[: len(packed) // 2], 1 << 30, True))
