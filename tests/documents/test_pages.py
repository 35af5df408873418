"""Page ranges as users write them."""

import pytest

from dsa.documents.pages import chosen_pages


@pytest.mark.parametrize(
    ("wanted", "pages"),
    [
        ("3", [3]),
        ("2-4", [2, 3, 4]),
        ("4-", [4, 5]),
        ("-2", [1, 2]),
        ("5, 1-2,2", [1, 2, 5]),
        ("1-5", [1, 2, 3, 4, 5]),
    ],
)
def test_ranges(wanted: str, pages: list[int]) -> None:
    assert chosen_pages(wanted, 5, "a.pdf") == pages


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("", "expected page numbers such as 12, 1-50"),
        ("-", "expected page numbers"),
        ("one", "expected page numbers .* got 'one'"),
        ("1;3", "expected page numbers"),
        ("0", "'0' must count up from 1"),
        ("4-2", "'4-2' must count up from 1"),
        ("1-6", "'1-6' is not in a.pdf, which has 5 pages"),
        ("6-", "'6-' is not in a.pdf"),
        ("99", "'99' is not in a.pdf"),
    ],
)
def test_no_ranges(wanted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_pages(wanted, 5, "a.pdf")
