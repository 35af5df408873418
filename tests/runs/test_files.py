"""Results are written whole or not at all, and an unwritable place is found early."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsa.runs.files import (
    check_folder_writable,
    check_writable,
    fill_folder,
    replace_folder,
    write_json,
    write_tensors,
)


def test_written(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    check_writable(file)
    assert list(tmp_path.iterdir()) == []
    write_json(file, {"é": 1.5, "none": None})
    assert json.loads(file.read_text(encoding="utf-8")) == {"é": 1.5, "none": None}
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_checking_leaves_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text("old")
    check_writable(file)
    assert file.read_text() == "old"


def test_refused_places(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"json: .* is a directory; expected a file"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"json: there is no directory .*missing to write out\.json in"):
        check_writable(tmp_path / "missing" / "out.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        check_writable(tmp_path / "file" / "out.json")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a directory that even root cannot write in")
def test_no_permission() -> None:
    with pytest.raises(OSError, match="json: cannot write in /proc"):
        check_writable("/proc/out.json")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    file.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        OSError, match=r"^json: cannot write .*out\.json: the disk is full; .*give another path"
    ) as caught:
        write_json(file, {"new": 1})
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_no_half_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "out.json", {"bad": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_tensors(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.safetensors"
    write_tensors(file, {"a": torch.arange(3)}, {"format": "x"})
    assert load_file(file)["a"].tolist() == [0, 1, 2]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(ValueError, match="contiguous"):
        write_tensors(file, {"a": torch.zeros(2, 3).T}, {})
    assert load_file(file)["a"].tolist() == [0, 1, 2]
    assert [each.name for each in file.parent.iterdir()] == ["out.safetensors"]


def write_one(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "one").write_text(content)


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        replace_folder(folder, write_one(content))
        assert (folder / "one").read_text() == content
        assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    replace_folder(folder, write_one("old"))

    def fail(part: Path) -> None:
        (part / "one").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*folder: the disk is full"):
        replace_folder(folder, fail)
    assert (folder / "one").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_filling_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    fill_folder(folder, write_one("old"))
    (folder / "mine").write_text("stays")
    fill_folder(folder, write_one("new"))
    assert {each.name: each.read_text() for each in folder.iterdir()} == {"one": "new", "mine": "stays"}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), Exception("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_fills_no_folder(tmp_path: Path, there: bool, error: Exception) -> None:
    folder = tmp_path / "folder"
    if there:
        fill_folder(folder, write_one("old"))

    def fail(part: Path) -> None:
        (part / "one").write_text("half")
        raise error

    with pytest.raises(OSError, match=r"^out: cannot write .*folder: the disk is full") as caught:
        fill_folder(folder, fail, "out")
    assert caught.value.errno == errno.ENOSPC
    assert [(each.name, each.read_text()) for each in tmp_path.rglob("*/*")] == ([("one", "old")] if there else [])
    assert folder.exists() == there


def test_an_error_that_is_not_the_disks_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fill_folder(tmp_path / "folder", lambda part: 1 / 0)


def test_a_folder_to_write_later(tmp_path: Path) -> None:
    assert check_folder_writable(tmp_path / "a" / "b", "out") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for name in ("file", "file/inside"):
        with pytest.raises(NotADirectoryError, match=r"^out: .*file is a file; expected a folder"):
            check_folder_writable(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a directory that even root cannot write in")
def test_a_folder_that_nobody_may_write() -> None:
    with pytest.raises(OSError, match=r"save-model: cannot write /proc/a/b .*give another folder"):
        check_folder_writable("/proc/a/b", "save-model")


def test_a_writer_killed_between_the_renames(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    replace_folder(folder, write_one("old"))
    folder.rename(tmp_path / ".folder.old")
    (tmp_path / ".folder.part").mkdir()

    def fail(part: Path) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        replace_folder(folder, fail)
    assert (folder / "one").read_text() == "old"
