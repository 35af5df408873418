"""The one reader of JSON that others wrote, and its users that need no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from dsa.cli.main import app
from dsa.cost.presets import PRESETS
from dsa.runs import json_files
from dsa.runs.json_files import Size, parse_json, read_json
from dsa.testing.mutations import dumps, mutations
from dsa.train.sources import documents
from dsa.train.state import RunFolder, TrainingState


@dataclass
class Expected:
    size: Size
    names: dict[str, int]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "has content = [], expected an object"),
        ("{", "is not JSON (EOF while parsing an object at line 1 column 1)"),
        (b"\xff\xfe", "is not JSON (expected value at line 1 column 1)"),
        ("[" * 1000, "is nested too deeply (recursion limit exceeded at line 1 column 202)"),
        ('{"size": 1}', "lacks names"),
        ('{"size": true, "names": {}}', "has size = True, expected a valid integer"),
        ('{"size": "1", "names": {}}', "has size = '1', expected a valid integer"),
        ('{"size": 0, "names": {}}', "has size = 0, expected greater than or equal to 1"),
        ('{"size": 1e400, "names": {}}', "has size = inf, expected a valid integer"),
        ('{"size": 1, "names": {"a": []}}', "has names.a = [], expected a valid integer"),
    ],
)
def test_one_sentence_says_file_field_what_was_expected_and_what_came(content: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=r"^x: F ") as caught:
        parse_json(content, Expected, "x: F", "copy it again")
    assert str(caught.value) == f"x: F {said}; copy it again"


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_BYTES", 2 << 20)
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"size": 1, "names": {"a" * (2 << 20): 1}}))
    with pytest.raises(ValueError, match="x: F has more than 2 MB of JSON; make it smaller"):
        read_json(file, Expected, "x: F", "make it smaller")
    with pytest.raises(ValueError, match="more than 2 MB"):
        read_json(Path("/dev/zero"), Expected, "x: F", "make it smaller")


def refusal(read: Callable[[], Any]) -> tuple[str | None, Any]:
    """What was said where a file was refused, or what was read."""
    try:
        return None, read()
    except ValueError as error:
        return str(error), None


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.nightly), 7])
def test_every_field_of_a_configuration_that_cost_reads(tmp_path: Path, every: int) -> None:
    found = []
    for name, value in list(mutations(PRESETS["DeepSeek-V3.2"], depth=2))[::every]:
        (tmp_path / "config.json").write_text(dumps(value))
        result = CliRunner().invoke(app, ["cost", str(tmp_path)])
        if result.exit_code not in (0, 2) or "Traceback" in result.output:
            found.append(f"{name}: {result.exception!r}")
    assert not found


def test_every_field_of_a_training_state(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    identity = {"stage": "warmup", "model": {"hidden_size": 3, "sample": [0.5]}}
    state = TrainingState(3, 1.5, identity, {"layers.0": {"a": torch.zeros(2)}})
    folder.save(state)
    with safe_open(folder.state_file, framework="pt") as opened:
        metadata = opened.metadata()
    for field in ("step", "seconds", "identity"):
        for _, value in mutations(json.loads(metadata[field])):
            changed = {**metadata, field: dumps(value)}
            save_file({"layers.0:a": torch.zeros(2)}, folder.state_file, metadata=changed)
            said, loaded = refusal(folder.load)
            if said is None:
                assert loaded.step >= 0
                assert isinstance(loaded.identity, dict)
            else:
                assert said.startswith(f"resume: {folder.state_file} is truncated or corrupt ({field} ")
    folder.log_file.write_text('{"step": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"^resume: line 2 of .*log\.jsonl has content = \[\], expected an object"):
        folder.cut_logs(5)


def test_every_field_of_a_row_of_training_data(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for _, value in mutations({"text": "Some words.", "other": [1]}):
        file.write_text(dumps(value) + "\n")
        said, found = refusal(lambda: list(documents(str(file))))
        if said is None:
            assert all(isinstance(text, str) for text in found)
        else:
            assert said.startswith("data: ")
            assert "line 1" in said
