"""HTML as a browser shows it: the tree, what is hidden, formulas, encodings, and work that grows as the page does."""

import sys
import warnings
from pathlib import Path

import pytest

from dsa.documents import read_source
from dsa.documents.encoding import decode_html
from dsa.documents.html import html_text


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<div><nav><ul><li>menu</ul></div><p>words", "words"),
        ("<p>a<b>b<i>c</b>d</i>e", "abcde"),
        ("<table><tr><td>1<td>2<tr><td>3</table>", "1  2\n\n3"),
        ("<p>one <b> two</b>\n three", "one two three"),
        ("<pre>a\n  b</pre>", "a\n  b"),
        ("<button>Send</button> <input type=submit value=Go><input type=hidden value=no>", "Send Go"),
        ("<svg><title>t</title><defs><text>d</text></defs><text>label</text></svg>", "label"),
        ("<select><option>a<option selected>b</select>", "b"),
        ("<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp></ruby>", "漢(かん)"),
        ("a < b << c &lt;d", "a < b << c <d"),
        ("<p>x<!-- <p>no --><p>y", "x\n\ny"),
        ("<details><summary>s</summary>inside</details>", "s\ninside"),
    ],
)
def test_what_is_seen(page: str, expected: str) -> None:
    assert html_text(page) == expected


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>no</p>",
        "<p hidden=''>no</p>",
        '<p style="color:red; display : none">no</p>',
        '<p style="DISPLAY:none!important">no</p>',
        '<p style="visibility:hidden">no</p>',
        "<template><p>no</p></template>",
        "<dialog>no</dialog>",
        "<datalist><option>no</datalist>",
        "<iframe>no</iframe>",
        "<noframes>no</noframes>",
        "<noscript>no</noscript>",
        "<script>no</script>",
        "<style>no</style>",
        "<video>no</video>",
        "<title>no</title>",
        "<textarea hidden>no</textarea>",
        "<div role=navigation>no</div>",
        "<svg><style>no</style><desc>no</desc></svg>",
    ],
)
def test_what_nobody_sees(hidden: str) -> None:
    assert html_text(f"<body>before {hidden} after").split() == ["before", "after"]


@pytest.mark.parametrize("shown", ["<dialog open>yes</dialog>", "<p hidden=until-found>yes</p>", "<p data-hidden>yes"])
def test_what_only_looks_hidden(shown: str) -> None:
    assert html_text(shown) == "yes"


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("<math><msup><mi>x</mi><mn>2</mn></msup></math>", "x^2"),
        ("<math><mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mi>c</mi></mfrac></math>", "(a+b)/c"),
        ("<math><msqrt><mi>x</mi></msqrt></math>", "√(x)"),
        ('<math alttext="\\beta"><mi>β</mi></math>', "\\beta"),
        (
            "<math><semantics><mi>y</mi><annotation encoding='application/x-tex'>\\y</annotation></semantics></math>",
            "\\y",
        ),
        ('<img class="mwe-math-fallback-image" alt="{\\displaystyle y}"><img alt="a photo">', "{\\displaystyle y}"),
        ('<math><mi>x</mi></math><span class="katex-html" aria-hidden="true">x</span>', "x"),
    ],
)
def test_formulas(formula: str, expected: str) -> None:
    assert html_text(formula) == expected


def test_much_that_is_left_out_is_said() -> None:
    with pytest.warns(UserWarning, match=r"400 characters of a.html were left out .*\(hidden 400\).* 5 were read"):
        html_text(f"<p>words<p hidden>{'n' * 400}", "a.html")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html_text(f"<p>{'words ' * 400}<nav>{'n' * 300}</nav>")


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("iso-8859-1", "cp1252", "“curly” €"),
        ("latin1", "cp1252", "naïve"),
        ("us-ascii", "cp1252", "naïve"),
        ("gb2312", "gb18030", "镕基 汉字"),
        ("x-sjis", "cp932", "日本語①"),
        ("shift_jis", "cp932", "髙日本"),
        ("windows-874", "cp874", "ภาษาไทย"),
        ("tis-620", "cp874", "ภาษาไทย"),
        ("iso-2022-jp", "iso2022_jp", "日本語"),
        ("euc-kr", "cp949", "뷁 한국어"),
        ("big5", "big5hkscs", "漢字"),
        ("euc-jp", "euc_jp", "日本語"),
        ("koi8-r", "koi8-r", "слово"),
        ("windows-1251", "cp1251", "слово"),
        ("utf-16", "utf-8", "naïve"),
        ("UTF8", "utf-8", "naïve"),
    ],
)
def test_encodings_by_the_web_s_table(label: str, codec: str, text: str) -> None:
    for declared in (
        f"<meta charset='{label}'>",
        f'<meta http-equiv=Content-Type content="text/html; charset={label}">',
        f'<?xml version="1.0" encoding="{label}"?>',
    ):
        page = declared.encode() + f"<p>{text}".encode(codec)
        assert html_text(decode_html(page, "a.html", "file")) == text


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_decides(tmp_path: Path, codec: str) -> None:
    (tmp_path / "a").write_bytes("<!doctype html><meta charset=windows-1251><p>naïve".encode(codec))
    assert read_source(tmp_path / "a").text == "naïve"


def test_a_declaration_in_a_comment_is_none() -> None:
    page = b"<!-- <meta charset=windows-1251> --><p>" + "naïve".encode()
    assert html_text(decode_html(page, "a.html", "file")) == "naïve"


def test_utf8_that_declares_something_else_is_said() -> None:
    with pytest.warns(UserWarning, match="declares iso-8859-1, but is UTF-8"):
        assert decode_html(b"<meta charset=iso-8859-1>" + "naïve".encode(), "a", "file").endswith("naïve")


def test_a_few_characters_that_cannot_be_read_are_said() -> None:
    page = b"<meta charset=utf-8>" + "ä".encode() * 300 + b"\xff"
    with pytest.warns(UserWarning, match="1 characters of a cannot be read as utf-8"):
        decode_html(page, "a", "file")


def calls(page: str) -> int:
    """Python calls that reading a page takes: the same on every machine."""
    count = 0

    def counting(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counting)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            html_text(page)
    finally:
        sys.setprofile(None)
    return count


PIECES = [
    "<!--",
    "<div>",
    "<p>",
    "<b>",
    "<a>",
    "<table>",
    "<ul><li>",
    "</p>",
    "<",
    "<![CDATA[",
    "&",
    '<x y="',
    "<script>",
    "<svg><desc>",
    "<math><mfrac>",
    "<b><p>",
    "<a href=x><div>",
    "<i></p>",
    "<select><option>",
    "<template>",
    "<font size=1><p>",
]


@pytest.mark.parametrize("piece", PIECES)
def test_work_grows_as_the_page_does(piece: str) -> None:
    """Of any piece, four times the page takes at most about four times the work."""
    small, large = (calls(piece * count) for count in (400, 1600))
    assert large <= 5 * small + 1000


def test_attributes_that_differ_do_not_multiply() -> None:
    small, large = (calls("".join(f"<p><b a={each}></p>" for each in range(count))) for count in (200, 800))
    assert large <= 5 * small
