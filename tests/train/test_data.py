"""Training data: every way a file can be wrong, and which windows a run reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer
from dsa.train import TokenStream, read_data, write_tokens
from dsa.train.data import Windows

EOS = 2


def test_documents_follow_each_other_with_end_of_text_between(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("abc")
    second.write_bytes(b"\xef\xbb\xbfde")
    said: list[str] = []
    tokenizer = tiny_tokenizer()
    stream = read_data([first, second], tokenizer, BYTE_VOCABULARY, said.append)
    expected = [*tokenizer("abc")["input_ids"], EOS, *tokenizer("de")["input_ids"], EOS]
    assert stream.ids.tolist() == expected
    assert said == ["Reading a.txt", "Reading b.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"caf\xe9", "not UTF-8 text .byte 3 is 0xe9"),
        (b"a\0b", "binary"),
        (b"a", "has 1 token.s.; at least 2"),
    ],
)
def test_bad_text_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt.* {message}"):
        read_data([path], tiny_tokenizer(), BYTE_VOCABULARY)


def test_missing_file_folder_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.txt"):
        read_data([tmp_path / "gone.txt"], None, 10)
    with pytest.raises(IsADirectoryError, match="is a directory; name the text files in it"):
        read_data([tmp_path], None, 10)
    with pytest.raises(ValueError, match="no file was given"):
        read_data([], None, 10)


@pytest.mark.parametrize(("largest", "dtype"), [(100, torch.uint16), (70_000, torch.int32)])
def test_token_file_round_trip(tmp_path: Path, largest: int, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    stream = TokenStream.of(torch.tensor([1, 2, largest]))
    path = write_tokens(tmp_path / "tokens.safetensors", stream)
    assert load_file(path)["input_ids"].dtype == dtype
    again = read_data([path], None, largest + 1)
    assert torch.equal(again.ids, stream.ids)
    assert again.fingerprint == stream.fingerprint
    with pytest.raises(
        ValueError, match=f"token ids from 1 to {largest}, the model's vocabulary ends at {largest - 1}"
    ):
        read_data([path], None, largest)
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        write_tokens(tmp_path / "tokens.pt", stream)


def test_files_that_are_no_token_files(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        read_data([path], None, 10)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"has no tensor 'input_ids' .it has weight."):
        read_data([path], None, 10)
    save_file({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match=r"must be integers \[n\], got torch.int64 \[2, 3\]"):
        read_data([path], None, 10)
    save_file({"input_ids": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="must be integers"):
        read_data([path], None, 10)


def test_fingerprint_tells_other_data_and_not_the_width() -> None:
    ids = torch.tensor([5, 6, 7])
    assert TokenStream.of(ids).fingerprint == TokenStream.of(ids.to(torch.int16)).fingerprint
    assert TokenStream.of(ids).fingerprint != TokenStream.of(ids.flip(0)).fingerprint


def test_data_shorter_than_a_sequence() -> None:
    with pytest.raises(ValueError, match="9 tokens in all are less than one sequence of seq_len=10"):
        Windows(TokenStream.of(torch.arange(9)), 10, 0)


@given(tokens=st.integers(7, 90), seed=st.integers(0, 5))
def test_windows_cover_an_epoch_once_and_depend_on_the_step_alone(tokens: int, seed: int) -> None:
    seq_len = 7
    stream = TokenStream.of(torch.arange(tokens))
    windows = Windows(stream, seq_len, seed)
    starts: list[int] = []
    for step in range(3 * tokens // seq_len):
        window = windows(step).ids[0]
        assert torch.equal(window, torch.arange(int(window[0]), int(window[0]) + seq_len))
        starts.append(int(window[0]))
    epoch = len(windows._epoch(0))
    assert (tokens - seq_len + 1) // seq_len <= epoch <= tokens // seq_len
    first = starts[:epoch]
    assert len(set(first)) == len(first)
    assert len({start % seq_len for start in first}) == 1
    fresh = Windows(stream, seq_len, seed)
    last = len(starts) - 1
    assert torch.equal(fresh(last).ids, windows(last).ids)


def test_epochs_and_seeds_differ() -> None:
    stream = TokenStream.of(torch.arange(1000))

    def starts(seed: int, epoch: int) -> list[int]:
        return Windows(stream, 10, seed)._epoch(epoch).tolist()

    assert starts(0, 0) != starts(0, 1)
    assert starts(0, 0) != starts(1, 0)
