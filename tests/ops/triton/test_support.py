"""Choosing tiles: by shared memory, by time, from the cache; and cutting rows into parts."""

import json
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dsa.ops import triton_support
from dsa.ops.triton_support import Choices
from dsa.ops.triton_tiles import split_width

CONFIGS = ({"BLOCK": 64}, {"BLOCK": 32}, {"BLOCK": 16})


@pytest.mark.parametrize("widest", [64, 128, 512])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 40, 64, 80, 96, 112, 120, 128, 192, 256, 576, 1000])
def test_parts_cover_a_row_once(size: int, widest: int) -> None:
    offsets, widths = split_width(size, widest)
    assert offsets == tuple(sum(widths[:i]) for i in range(len(widths)))
    assert all(16 <= width <= widest and width.bit_count() == 1 for width in widths)
    assert offsets[-1] < size <= sum(widths)
    assert sum(widths) <= max(16, size + size // 7 + 15)


class Timer:
    """Counts launches; a tile of 64 does not fit, and 16 is the fastest."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def launch(self, config: triton_support.Config) -> None:
        self.launched.append(config["BLOCK"])
        if config["BLOCK"] == 64:
            raise OutOfResources(2, 1, "shared memory")

    def time(self, launch: object) -> float:
        launch()
        return float(self.launched[-1])


def test_fastest_is_chosen_once_and_kept(tmp_path: Path) -> None:
    file, timer = tmp_path / "below" / "gpu.json", Timer()
    choices = Choices(file, timer.time)
    assert choices.choose("op (1, 2)", CONFIGS, timer.launch) == {"BLOCK": 16}
    assert timer.launched == [64, 32, 16]
    choices.choose("op (1, 2)", CONFIGS, timer.launch)
    assert Choices(file, timer.time).choose("op (1, 2)", CONFIGS, timer.launch) == {"BLOCK": 16}
    assert len(timer.launched) == 3
    # Another list of candidates, as after an update, is measured again.
    assert Choices(file, timer.time).choose("op (1, 2)", CONFIGS[:2], timer.launch) == {"BLOCK": 32}
    assert json.loads(file.read_text())["op (1, 2)"]["best"] == 1


def test_a_broken_or_unwritable_cache_costs_only_time(tmp_path: Path) -> None:
    broken = tmp_path / "gpu.json"
    broken.write_text("{")
    timer = Timer()
    assert Choices(broken, timer.time).choose("op", CONFIGS, timer.launch) == {"BLOCK": 16}
    unwritable = Choices(broken / "no_directory" / "gpu.json", timer.time)
    assert unwritable.known("op", CONFIGS) is None
    assert unwritable.choose("op", CONFIGS, timer.launch) == {"BLOCK": 16}
    assert unwritable.known("op", CONFIGS) == {"BLOCK": 16}


def test_a_tile_that_does_not_fit_gives_way() -> None:
    timer = Timer()
    triton_support.launch_chosen("op", (), CONFIGS, torch.device("cpu"), timer.launch)
    assert timer.launched == [64, 32]
    with pytest.raises(NotImplementedError, match="no tile fits this GPU"):
        triton_support.launch_chosen("op", (3, 4), CONFIGS[:1], torch.device("cpu"), timer.launch)


def test_estimates_sort_out_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "shared_memory", lambda _: 40)
    device = torch.device("cpu")
    assert triton_support.fitting(CONFIGS, lambda config: config["BLOCK"], device) == list(CONFIGS[1:])
    assert triton_support.fitting(CONFIGS, lambda config: 100 + config["BLOCK"], device) == [CONFIGS[2]]


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "need an NVIDIA GPU, or CPU tensors with TRITON_INTERPRET=1" in triton_support.gap(None, tensor)
    assert "the tensors are on meta" in triton_support.gap(tensor.to("meta"))
    assert list(triton_support.with_triton({"reference": None}, tensor)) == ["reference", "triton"]
    monkeypatch.setattr(triton_support, "_INSTALLED", False)
    assert "pip install" in triton_support.gap(tensor)
