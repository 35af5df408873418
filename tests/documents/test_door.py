"""Text from files, stdin, options and rows of data comes in through one door."""

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from dsa.documents import read_source, read_stdin
from dsa.text import bounded, checked, read_text, tidy
from dsa.train.sources import documents


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (os.fsdecode(b"gr\xf6"), "is not UTF-8 text: the byte after 2 characters is 0xf6"),
        ("a\ud83d", r"holds half of a surrogate pair \(U\+D83D after 1 characters\)"),
        ("a\0b", "is binary .it holds NUL after 1 characters"),
        ("ab\x01\x02", "holds 2 control characters among 4"),
    ],
)
def test_what_no_tokenizer_takes(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^ask: {problem}"):
        checked(text, "ask:")
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": text}))
    # JSON has no halves of surrogate pairs: its reader refuses them, and the door the rest.
    is_json = text.isascii()
    refused = f"column 'text' of line 2 of .*a.jsonl {problem}" if is_json else r"line 2 of .*a\.jsonl is not JSON"
    with pytest.raises(ValueError, match=f"^data: {refused}"):
        list(documents(str(rows)))


def test_a_byte_order_mark_is_no_text() -> None:
    assert checked("\ufeffwords\x1b[31m" + " more" * 20, "ask:").startswith("words\x1b")


class Stdin(io.TextIOWrapper):
    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="ascii")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("naïve".encode(), "naïve"),
        ("naïve".encode("utf-8-sig"), "naïve"),
        (b"<!doctype html><p>words", "words"),
    ],
)
def test_stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes, expected: str) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(raw))
    assert read_stdin().text == expected


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"gr\xf6", r"stdin: stdin is not UTF-8 text \(byte 2 is 0xf6\)"),
        (b"a\0b", "stdin: stdin is binary"),
        (b" \n", "stdin: stdin is empty"),
        ("naïve".encode("utf-16"), "stdin: stdin is UTF-16"),
    ],
)
def test_stdin_refused(monkeypatch: pytest.MonkeyPatch, raw: bytes, problem: str) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(raw))
    with pytest.raises(ValueError, match=problem):
        read_stdin()


def test_stdin_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        read_stdin()


def test_a_device_has_no_end(tmp_path: Path) -> None:
    for read in (read_source, lambda path: read_text(path, "file")):
        with pytest.raises(ValueError, match="/dev/zero is a device and has no end"):
            read("/dev/zero")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"line 1 of .*zero.jsonl is longer than 64 MiB"):
        list(documents(str(tmp_path / "zero.jsonl")))


def test_a_pipe_is_read_up_to_a_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file: a holds more than 1 MiB"):
        bounded(io.BytesIO(b"a" * ((1 << 20) + 1)), "file: a", 1 << 20)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("words",))
    writer.start()
    assert read_source(pipe).text == "words"
    writer.join()


def test_tidying_takes_each_blank_once() -> None:
    assert tidy("a" + " " * 200_000 + "b \t \n\n\n\nc ") == "a" + " " * 200_000 + "b\n\nc"
