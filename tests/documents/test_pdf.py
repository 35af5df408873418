"""PDFs of many kinds, each made here: what they say, in which order, and what cannot be read of them."""

import time
import warnings
import zlib
from pathlib import Path

import pytest
from fpdf import FPDF

from dsa.documents.pdf import read_pdf


def written(*objects: str | bytes) -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    out = b"%PDF-1.7\n"
    places = []
    for number, each in enumerate(objects, start=1):
        places.append(len(out))
        body = each if isinstance(each, bytes) else each.encode("latin-1")
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (len(objects) + 1, table, len(objects) + 1, len(out))
    )


def stream(content: str | bytes) -> bytes:
    body = content if isinstance(content, bytes) else content.encode("latin-1")
    return b"<< /Length %d >>\nstream\n%b\nendstream" % (len(body), body)


def one_page(content: str | bytes, font: str, *more: str | bytes, page: str = "", catalog: str = "") -> bytes:
    """One page whose only font is object 5; further objects begin with number 6."""
    return written(
        f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R "
        f"/Resources << /Font << /F 5 0 R >> >> {page} >>",
        stream(content),
        font,
        *more,
    )


HELVETICA = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def text_of(raw: bytes) -> str:
    return read_pdf(raw, "a.pdf", "file").text.strip()


@pytest.mark.parametrize(
    ("cmap", "codec", "ordering", "text"),
    [
        ("UniJIS-UTF16-H", "utf-16-be", "Japan1", "日本語の文書"),
        ("90ms-RKSJ-H", "cp932", "Japan1", "日本語の文書"),
        ("UniGB-UTF16-H", "utf-16-be", "GB1", "中文文件"),
        ("GBK-EUC-H", "gbk", "GB1", "中文文件"),
        ("UniKS-UTF16-H", "utf-16-be", "Korea1", "한국어"),
        ("UniCNS-UTF16-H", "utf-16-be", "CNS1", "漢字"),
    ],
)
def test_characters_of_east_asia_by_predefined_maps(cmap: str, codec: str, ordering: str, text: str) -> None:
    raw = one_page(
        f"BT /F 12 Tf 50 700 Td <{text.encode(codec).hex()}> Tj ET",
        f"<< /Type /Font /Subtype /Type0 /BaseFont /Some /Encoding /{cmap} /DescendantFonts [6 0 R] >>",
        "<< /Type /Font /Subtype /CIDFontType0 /BaseFont /Some /FontDescriptor 7 0 R /DW 1000 "
        f"/CIDSystemInfo << /Registry (Adobe) /Ordering ({ordering}) /Supplement 5 >> >>",
        "<< /Type /FontDescriptor /FontName /Some /Flags 4 /FontBBox [0 -200 1000 900] /ItalicAngle 0 /Ascent 900 "
        "/Descent -200 /CapHeight 700 /StemV 80 >>",
    )
    assert text_of(raw) == text


def mapped(code: str, target: str) -> bytes:
    return stream(
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /M def /CMapType 2 def\n"
        f"1 begincodespacerange <00> <ff> endcodespacerange\n1 beginbfchar <{code}> <{target}> endbfchar\n"
        "endcmap end end"
    )


def test_an_emoji_is_one_character() -> None:
    font = HELVETICA.replace(">>", "/ToUnicode 6 0 R >>")
    raw = one_page("BT /F 12 Tf 50 700 Td (A) Tj ET", font, mapped("41", "d83dde00"))
    assert text_of(raw) == "\N{GRINNING FACE}"


def test_the_actual_text_of_a_ligature() -> None:
    font = HELVETICA.replace(">>", "/ToUnicode 6 0 R >>")
    content = "BT /F 12 Tf 50 700 Td (of) Tj /Span << /ActualText (fi) >> BDC (A) Tj EMC (ce) Tj ET"
    assert text_of(one_page(content, font, mapped("41", "e000"))) == "office"


def test_most_characters_unknown() -> None:
    font = HELVETICA.replace(">>", "/ToUnicode 6 0 R >>")
    unknown = mapped("41", "e000")
    with pytest.raises(ValueError, match=r"does not say what 20 of its 23 characters are.*ocrmypdf --force-ocr"):
        text_of(one_page(f"BT /F 12 Tf 50 700 Td ({'A' * 20} and) Tj ET", font, unknown))
    with pytest.warns(UserWarning, match=r"2 of the 18 characters of a.pdf are unknown \(11%; most on page 1\)"):
        text_of(one_page("BT /F 12 Tf 50 700 Td (some more AA words too) Tj ET", font, unknown))


def form(content: str, *, label: str = "") -> bytes:
    widget = (
        "<< /Type /Annot /Subtype /Widget /FT /Tx /T (full_name) /V (Ada Lovelace) /Rect [120 695 300 715] /F 4 "
        f"/P 3 0 R {label} >>"
    )
    return one_page(
        content,
        HELVETICA,
        widget,
        page="/Annots [6 0 R]",
        catalog="/AcroForm << /Fields [6 0 R] /DA (/Helv 12 Tf 0 g) >>",
    )


def test_a_filled_form() -> None:
    content = "BT /F 12 Tf 50 700 Td (Name:) Tj 0 -40 Td (Signed in London) Tj ET"
    assert text_of(form(content)) == "Name: Ada Lovelace\nSigned in London"


def test_a_page_of_fields_only() -> None:
    assert text_of(form("")) == "full_name: Ada Lovelace"


def test_encrypted_for_a_certificate() -> None:
    raw = one_page(
        "BT /F 12 Tf 50 700 Td (x) Tj ET", HELVETICA, "<< /Filter /Adobe.PubSec /SubFilter /adbe.pkcs7.s5 /V 4 >>"
    )
    raw = raw.replace(b"/Root 1 0 R", b"/Root 1 0 R /Encrypt 6 0 R /ID [<00> <00>]")
    with pytest.raises(ValueError, match=r"a.pdf is encrypted for holders of a certificate"):
        text_of(raw)


LEFT = "The left column has words that go on and on"
RIGHT = "the right column holds others than these ones"


def test_columns_drawn_line_by_line() -> None:
    lines = "".join(
        f"1 0 0 1 50 {700 - 14 * each} Tm ({LEFT} {each}) Tj 1 0 0 1 330 {700 - 14 * each} Tm ({RIGHT} {each}) Tj "
        for each in range(8)
    )
    found = text_of(one_page(f"BT /F 11 Tf {lines} ET", HELVETICA))
    assert found == "\n".join([*(f"{LEFT} {each}" for each in range(8)), *(f"{RIGHT} {each}" for each in range(8))])


def test_a_table_is_read_across() -> None:
    lines = "".join(
        f"1 0 0 1 50 {700 - 14 * each} Tm (item {each}) Tj 1 0 0 1 330 {700 - 14 * each} Tm (price {each}) Tj "
        for each in range(8)
    )
    assert text_of(one_page(f"BT /F 11 Tf {lines} ET", HELVETICA)).splitlines()[3] == "item 3  price 3"


def test_kerned_capitals_stay_whole() -> None:
    assert text_of(one_page("BT /F 12 Tf 50 700 Td [(Y) 120 (ou are)] TJ ET", HELVETICA)) == "You are"


def test_dot_leaders_are_short() -> None:
    raw = one_page(f"BT /F 10 Tf 50 700 Td (Introduction {'. ' * 40}12) Tj ET", HELVETICA)
    assert text_of(raw) == "Introduction ... 12"


def pages(*texts: str, header: str = "A guide to things") -> bytes:
    pdf = FPDF()
    pdf.set_font("helvetica", size=12)
    for number, text in enumerate(texts, start=1):
        pdf.add_page()
        if header:
            pdf.text(20, 10, header)
        pdf.text(20, 40, text)
        pdf.text(20, 60, f"and more of {text}")
        pdf.text(100, 285, f"Page {number} of {len(texts)}")
    return bytes(pdf.output())


def test_running_headers_are_read_once_and_said() -> None:
    with pytest.warns(UserWarning, match="10 running headers and footers of a.pdf .* were read once"):
        text = text_of(pages("one", "two", "three", "four", "five", "six"))
    assert text.count("A guide to things") == text.count("Page ") == 1
    for word in ("one", "two", "three", "four", "five", "six"):
        assert f"{word}\nand more of {word}" in text


def test_what_only_looks_like_a_running_header() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = text_of(pages("one", "two", "three"))
    assert text.count("A guide to things") == 3


def test_a_hundred_thousand_pages_that_are_one() -> None:
    kids = "3 0 R " * 100_000
    raw = written(
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count 100000 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        stream("BT /F 12 Tf 50 700 Td (x) Tj ET"),
        HELVETICA,
    )
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"has 100,000 pages; 20,000 are read at most: choose some with --pages"):
        text_of(raw)
    assert time.perf_counter() - begun < 2


def test_a_file_that_is_cut_off_but_opens(tmp_path: Path) -> None:
    raw = one_page("BT /F 12 Tf 50 700 Td (words) Tj ET", HELVETICA)
    with pytest.warns(UserWarning, match="a.pdf has no end: it is cut off"):
        assert text_of(raw[: raw.index(b"startxref")]) == "words"


@pytest.mark.parametrize("filters", [1, 2])
@pytest.mark.parametrize("content", [b"q ", b"(xxxxxxxxxxxxxxxxxxxxxxxxxxx) Tj "])
def test_a_small_file_that_unpacks_to_a_large_page(content: bytes, filters: int) -> None:
    packed = content * (8_000_000 // len(content))
    for _ in range(filters):
        packed = zlib.compress(packed, 9)
    body = b"<< /Filter [%b] /Length %d >>\nstream\n%b\nendstream" % (b"/FlateDecode " * filters, len(packed), packed)
    raw = written(
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        body,
        HELVETICA,
    )
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="holds a stream that unpacks to far more than a page of text does"):
        text_of(raw)
    assert time.perf_counter() - begun < 2


def test_a_page_longer_than_any_that_is_read() -> None:
    with pytest.raises(ValueError, match=r"page 1 of a.pdf holds 200,025 characters; 200,000 are read"):
        text_of(one_page(f"BT /F 12 Tf 50 700 Td {'(xxxxxxxxxxxxxxxxxxxxxxxxx) Tj ' * 8001} ET", HELVETICA))
