"""Several files as one document: the text, and which file a page is of."""

from pathlib import Path

import fpdf
import pytest

from dsa.documents import SourceDocument, joined, read_source, read_sources


def test_pages_are_counted_through() -> None:
    document = joined([SourceDocument.of_pages("a/one.pdf", ["first", "", "third"]), SourceDocument("text\n", "b.txt")])
    assert document.text == "first\n\nthird\n\ntext"
    assert [page.number for page in document.pages] == [1, 2, 3, 4]
    assert [document.text[page.start : page.end].strip() for page in document.pages] == ["first", "", "third", "text"]
    places = [document.place(document.page_of(document.text.index(word))) for word in ("first", "third", "text")]
    assert places == ["one.pdf, p. 1", "one.pdf, p. 3", "b.txt"]
    assert (document.name, document.is_joined) == ("one.pdf, b.txt", True)
    assert document.pages[-1].end == len(document.text)


def test_one_file_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alone\n")
    assert read_sources([tmp_path]) == read_source(tmp_path / "a.txt")
    assert not read_sources([tmp_path]).is_joined


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "inner").mkdir()
    assert read_sources([tmp_path]).text == "text of a.md\n\ntext of b.txt"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"file: the folder .* has no file whose name ends in one of \.pdf"):
        read_sources([tmp_path])
    pdf = fpdf.FPDF()
    pdf.add_page()
    pdf.set_font("Helvetica", size=12)
    pdf.multi_cell(0, text="A page.")
    pdf.output(str(tmp_path / "a.pdf"))
    with pytest.raises(ValueError, match="pages: expected one file, got 2"):
        read_sources([tmp_path / "a.pdf", tmp_path / "a.pdf"], pages="1")
    assert read_sources([tmp_path], pages="1").text.strip() == "A page."
