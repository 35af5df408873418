"""Pages as ranges of the text."""

import pytest

from dsa.documents import Page, SourceDocument


def test_pages_cover_the_text() -> None:
    document = SourceDocument.of_pages("a", ["one", "", "three"])
    assert document.text == "one\n\nthree\n\n"
    assert document.pages == (Page(1, 0, 5), Page(2, 5, 5), Page(3, 5, 12))
    assert document.has_pages


@pytest.mark.parametrize(("offset", "number"), [(0, 1), (4, 1), (5, 3), (11, 3)])
def test_the_page_of_a_character(offset: int, number: int) -> None:
    assert SourceDocument.of_pages("a", ["one", "", "three"]).page_of(offset) == number


def test_text_without_pages_is_one() -> None:
    document = SourceDocument("text", "a")
    assert (document.pages, document.has_pages, document.page_of(3)) == ((Page(1, 0, 4),), False, 1)


@pytest.mark.parametrize("offset", [-1, 4])
def test_no_such_character(offset: int) -> None:
    with pytest.raises(ValueError, match=f"0 to 3, got {offset}"):
        SourceDocument("text", "a").page_of(offset)
