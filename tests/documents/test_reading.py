"""Every format, every way in which a file is not what it should be."""

import builtins
from pathlib import Path
from typing import Any

import pytest
from fpdf import FPDF
from pypdf import PdfReader, PdfWriter

from dsa.documents import read_source


def write_pdf(path: Path, *pages: str) -> Path:
    pdf = FPDF()
    for text in pages:
        pdf.add_page()
        pdf.set_font("helvetica", size=12)
        if text:
            pdf.multi_cell(0, 8, text)
    pdf.output(str(path))
    return path


def encrypt(path: Path, password: str) -> Path:
    writer = PdfWriter(clone_from=PdfReader(path))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="AES-256")
    writer.write(path)
    return path


def test_a_pdf_keeps_its_pages(tmp_path: Path) -> None:
    shown: list[tuple[str, int]] = []

    class Bar:
        def __init__(self, label: str, total: int) -> None:
            self.total = total
            shown.append((label, total))

        def __enter__(self) -> Any:
            return lambda: shown.append(("", 1))

        def __exit__(self, *error: object) -> None:
            pass

    file = write_pdf(tmp_path / "a.pdf", "The first page.", "The second page.")
    document = read_source(file, progress=Bar)
    assert document.text == "The first page.\n\nThe second page.\n\n"
    assert document.has_pages
    assert [document.text[page.start : page.end].strip() for page in document.pages] == [
        "The first page.",
        "The second page.",
    ]
    assert document.page_of(document.text.index("second")) == 2
    assert shown == [(f"Reading 2 pages of {file}", 2), ("", 1), ("", 1)]


def test_a_pdf_without_a_suffix(tmp_path: Path) -> None:
    assert read_source(write_pdf(tmp_path / "report", "Some words.")).text == "Some words.\n\n"


def test_pages_without_text_are_said_and_counted(tmp_path: Path) -> None:
    file = write_pdf(tmp_path / "a.pdf", "First.", "", "Third.")
    with pytest.warns(UserWarning, match=r"1 of the 3 pages read of .* have no text .*ocrmypdf"):
        document = read_source(file)
    assert document.page_of(document.text.index("Third")) == 3


def test_some_pages(tmp_path: Path) -> None:
    file = write_pdf(tmp_path / "a.pdf", "First.", "Second.", "Third.", "Fourth.")
    document = read_source(file, pages="2,4-")
    assert document.text == "Second.\n\nFourth.\n\n"
    assert [page.number for page in document.pages] == [2, 4]
    assert document.page_of(document.text.index("Fourth")) == 4


def test_pages_of_what_has_none(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Some words.")
    with pytest.raises(ValueError, match=r"pages: .*a.txt is no PDF and has no pages"):
        read_source(file, pages="1")


def test_a_scan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 page\(s\) read of .*a.pdf has text.*ocrmypdf"):
        read_source(write_pdf(tmp_path / "a.pdf", "", ""))


def test_encrypted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.pdf is encrypted.*qpdf --password"):
        read_source(encrypt(write_pdf(tmp_path / "a.pdf", "Secret."), "password"))


def test_encrypted_for_everybody_to_open(tmp_path: Path) -> None:
    assert read_source(encrypt(write_pdf(tmp_path / "a.pdf", "Open."), "")).text == "Open.\n\n"


@pytest.mark.parametrize("cut", [9, 300, 700])
def test_a_pdf_cut_off(tmp_path: Path, cut: int) -> None:
    file = write_pdf(tmp_path / "a.pdf", "Some words.")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"file: .*a\.pdf.*(corrupt or cut off|has no pages)"):
        read_source(file)


def test_no_pages(tmp_path: Path) -> None:
    PdfWriter().write(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="has no pages"):
        read_source(tmp_path / "a.pdf")


def test_without_pypdfium2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_pdf(tmp_path / "a.pdf", "Some words.")
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "pypdfium2":
            raise ImportError("No module named 'pypdfium2'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"pip install 'dsa-attention\[pdf\]'"):
        read_source(file)


PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {color: red}</style></head><body>
<nav>menu</nav><h1>A  heading</h1><p>Caf&eacute; &lt;b&gt;
and <b>more</b>.<script>alert("never")</script></p><pre>a
  b</pre></body></html>"""


@pytest.mark.parametrize("name", ["a.html", "a.htm", "a"])
def test_html(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(PAGE)
    document = read_source(tmp_path / name)
    assert [line.strip() for line in document.text.splitlines() if line.strip()] == [
        "A heading",
        "Café <b> and more.",
        "a",
        "b",
    ]
    assert not document.has_pages


def test_html_in_its_own_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes('<meta charset="iso-8859-1"><p>naïve'.encode("latin-1"))
    assert read_source(tmp_path / "a.html").text == "naïve"


def test_html_whose_head_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html><head><title>T</title><p>words")
    assert read_source(tmp_path / "a.html").text == "words"


@pytest.mark.parametrize("name", ["a.md", "a.txt", "a.log"])
def test_other_text_stays_as_it_is(tmp_path: Path, name: str) -> None:
    text = "# A *heading*\n\n<b>bold</b> %PDF-1.7 \x1b[31m\r\n" + "words " * 20
    (tmp_path / name).write_bytes(text.encode())
    assert read_source(tmp_path / name).text == text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pdf", b"", "is empty"),
        ("a.html", b" \n", "is empty"),
        ("a.pdf", b"plain words", "is called PDF, but holds no PDF"),
        ("a.pdf", PAGE.encode(), "is called PDF, but holds HTML; rename it to .html"),
        ("a.txt", b"%PDF-1.7\n", "is called text, but holds a PDF; rename it to .pdf"),
        ("a.md", b"%PDF-1.7\n", "is called text, but holds a PDF"),
        ("a.html", b"%PDF-1.7\n", "is called HTML, but holds a PDF"),
        ("a.docx", b"PK\x03\x04rest", "a zip archive, as .docx"),
        ("a.pdf", b"\x89PNG\r\n", "is a PNG picture; save it as PDF or text first"),
        ("a.html", b"<html><script>draw()</script>", "holds no visible text"),
        ("a.html", b"<p>\xff</p>", "is not UTF-8 text"),
        ("a.html", b'<meta charset="nonsense"><p>\xff', "is neither UTF-8 nor nonsense"),
        ("a.txt", b"ab\x01\x02\x03\x04", "4 control characters among 6"),
        ("a.txt", b"ab\0cd", "is binary"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_source(file)
    assert str(caught.value).startswith("file: ")
    assert str(file) in str(caught.value)
