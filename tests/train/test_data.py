"""Training data: every way a file can be wrong, and which windows a run reads."""

from __future__ import annotations

import json
import sys
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


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("datasets")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_are_documents(tmp_path: Path, name: str) -> None:
    rows = [{"title": "x", "body": text} for text in ("abc", " ", "defg")]
    path = write_rows(tmp_path / name, rows)
    tokenizer = tiny_tokenizer()
    stream = read_data([path], tokenizer, BYTE_VOCABULARY, column="body")
    expected = [*tokenizer("abc")["input_ids"], EOS, *tokenizer("defg")["input_ids"], EOS]
    assert stream.ids.tolist() == expected
    assert stream.starts.tolist() == [0, 4]
    with pytest.raises(
        ValueError, match=r"1 of .*rows\..* has no column 'text'; it has 'title', 'body': choose one with"
    ):
        read_data([path], tokenizer, BYTE_VOCABULARY)
    numbers = write_rows(tmp_path / f"numbers{path.suffix}", [{"text": 3}])
    with pytest.raises(ValueError, match=r"column 'text' of .* holds int, expected text"):
        read_data([numbers], tokenizer, BYTE_VOCABULARY)
    empty = write_rows(tmp_path / f"empty{path.suffix}", [{"text": ""}])
    with pytest.raises(ValueError, match="is empty: none of its documents holds text"):
        read_data([empty], tokenizer, BYTE_VOCABULARY)


def test_json_lines_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "abc"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl is not UTF-8 .byte 13 is 0xe9"):
        read_data([path], tiny_tokenizer(), BYTE_VOCABULARY)
    path.write_text("{'text': 'abc'}\n")
    with pytest.raises(ValueError, match=r"line 1 of .*rows.jsonl is not JSON"):
        read_data([path], tiny_tokenizer(), BYTE_VOCABULARY)
    path.write_text('"abc"\n')
    with pytest.raises(ValueError, match="no columns, it is str"):
        read_data([path], tiny_tokenizer(), BYTE_VOCABULARY)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read as parquet"):
        read_data([path], tiny_tokenizer(), BYTE_VOCABULARY)


def test_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[object, ...]] = []

    def load(name: str, configuration: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, configuration, split, streaming))
        return ({"text": "abc" * number} for number in range(1, 10_000))

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = read_data(["hub:owner/name:part:test"], tiny_tokenizer(), BYTE_VOCABULARY, remote_tokens=50)
    assert asked == [("owner/name", "part", "test", True)]
    # 4 + 7 + 10 + 13 + 16 tokens: the document that reaches 50 is the last.
    assert len(stream) == 50
    assert len(read_data(["hub:owner/name"], tiny_tokenizer(), BYTE_VOCABULARY, max_tokens=12, remote_tokens=50)) == 21
    assert asked[-1] == ("owner/name", None, "train", True)

    def gone(*args: object, **kwargs: object) -> object:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(OSError, match=r"hub:owner/name cannot be read from the Hugging Face Hub .*no route"):
        read_data(["hub:owner/name"], tiny_tokenizer(), BYTE_VOCABULARY)
    with pytest.raises(ValueError, match="must look like hub:OWNER/NAME"):
        read_data(["hub:"], tiny_tokenizer(), BYTE_VOCABULARY)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"reading a.parquet needs the package datasets: pip install 'dsa-attention"):
        read_data([tmp_path / "a.parquet"], tiny_tokenizer(), BYTE_VOCABULARY)


def test_reading_stops_at_max_tokens(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x" * 20)
    stream = read_data([tmp_path / "a.txt", tmp_path / "b.txt"], tiny_tokenizer(), BYTE_VOCABULARY, max_tokens=10)
    assert len(stream) == 21
    path = write_tokens(tmp_path / "t.safetensors", TokenStream.of(torch.arange(9), torch.tensor([0, 4, 7])))
    cut = read_data([path], None, 10, max_tokens=6)
    assert (cut.ids.tolist(), cut.starts.tolist()) == (list(range(6)), [0, 4])


def test_document_starts_survive_a_token_file(tmp_path: Path) -> None:
    stream = TokenStream.of(torch.arange(9), torch.tensor([0, 4]))
    again = read_data([write_tokens(tmp_path / "t.safetensors", stream)], None, 10)
    assert again.starts.tolist() == [0, 4]
    assert again.fingerprint == stream.fingerprint
    assert again.fingerprint != TokenStream.of(torch.arange(9)).fingerprint
    starts = torch.tensor([0, 9])
    save_file({"input_ids": torch.arange(9), "document_starts": starts}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"document_starts in .* must be ascending int64"):
        read_data([tmp_path / "t.safetensors"], None, 10)


def test_positions_begin_anew_with_each_document() -> None:
    stream = TokenStream.of(torch.arange(12), torch.tensor([0, 5, 8]))
    windows = Windows(stream, 12, 0)
    assert windows(0).positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert windows(0).eligible(0, 2).tolist() == [2, 3, 4, 7, 10, 11]
    assert Windows(stream, 12, 0, boundaries=False)(0).positions is None
    assert Windows(TokenStream.of(torch.arange(12)), 12, 0)(0).eligible(0, 9).tolist() == [9, 10, 11]
    two = Windows(TokenStream.of(torch.arange(40), torch.tensor([0, 33])), 10, 0)(0, 3)
    assert two.ids.shape == (3, 10)


def test_windows_that_teach_nothing_are_left_out() -> None:
    starts = torch.cat((torch.arange(0, 60, 6), torch.tensor([60])))
    stream = TokenStream.of(torch.arange(100), starts)
    windows = Windows(stream, 12, 0, first=6, at_least=3)
    for number in range(20):
        assert len(windows(number).eligible(0, 6)) >= 3
    with pytest.raises(ValueError, match=r"no window of 12 tokens has 3 tokens with 11 .*longest document has 40"):
        Windows(stream, 12, 0, first=11, at_least=3)


def test_a_quoted_end_of_text_ends_no_document(tmp_path: Path) -> None:
    file = tmp_path / "quoted.txt"
    file.write_text("The token <eos> ends a document.")
    tokenizer = tiny_tokenizer()
    stream = read_data([str(file)], tokenizer, len(tokenizer), print)
    ids = stream.ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
