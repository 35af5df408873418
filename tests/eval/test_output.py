"""Results are written whole or not at all, and an unwritable place is found early."""

import json
import os
from pathlib import Path

import pytest

from dsa.eval.output import check_writable, write_json


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
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_json(file, {"new": 1})
    assert file.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_no_half_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "out.json", {"bad": float("nan")})
    assert list(tmp_path.iterdir()) == []
