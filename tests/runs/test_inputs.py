"""Texts: what is read, how much of it is tokenised, and what is refused."""

from pathlib import Path

import pytest

from dsa.runs.inputs import Document, encode, read_document
from dsa.testing.tiny_tokenizer import tiny_tokenizer


def test_the_language_reference() -> None:
    document = read_document()
    assert document.text == read_document().text
    assert len(document.text) > 400_000
    assert document.text.startswith('The "assert" statement')


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\n")
    assert read_document(file) == Document("naïve\n", str(file))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"abc\xff\xfe", r"is not UTF-8 text \(byte 3 is 0xff\)"),
        (b"abc\0def", "is binary"),
    ],
)
def test_refused_files(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_document(file)
    assert str(caught.value).startswith(f"file: {file}")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="file: there is no file"):
        read_document(tmp_path / "missing.txt")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        read_document(tmp_path)


@pytest.mark.parametrize("tokens", [2, 50, 3000])
def test_the_first_tokens(tokens: int) -> None:
    document = Document("äb c" * 4000, "a text")
    expected = tiny_tokenizer()(document.text)["input_ids"][:tokens]
    assert encode(document, tiny_tokenizer(), tokens).tolist() == [expected]


def test_all_of_a_short_text() -> None:
    assert encode(Document("twelve bytes", "a text"), tiny_tokenizer()).shape == (1, 12)
    assert encode(Document("twelve bytes", "a text"), tiny_tokenizer(), default=5).shape == (1, 5)


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("a", None, r"a text has 1 token\(s\); at least 2 are needed"),
        ("twelve bytes", 13, "a text has only 12 tokens, 13 were asked for"),
        ("twelve bytes", 1, "tokens must be at least 2, got 1"),
    ],
)
def test_too_short(text: str, tokens: int | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        encode(Document(text, "a text"), tiny_tokenizer(), tokens)


def test_a_text_has_no_control_tokens_of_its_own() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode(Document("a<eos>b<bos>", "a"), tokenizer)[0]
    assert not {0, 1, 2} & set(ids.tolist())
    assert tokenizer.decode(ids) == "a<eos>b<bos>"
