"""Every JSON field of a model's and its indexers' files, mutated: one sentence and exit code 2, or it loads rightly.

All of them take minutes and run with `-m nightly`; otherwise every thirteenth does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import dsa
from dsa.cli.main import app
from dsa.testing.mutations import dumps, mutations
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    dsa.attach(model, TINY_CONFIG)
    dsa.save_indexers(model, folder / "indexers.safetensors", trained=True)
    model.save_pretrained(folder / "attached")
    tiny_tokenizer().save_pretrained(folder / "attached")
    return folder


EVERY = [pytest.param(1, marks=pytest.mark.nightly), 13]
"""One in how many mutations is tried."""


def complaints(command: list[str], cases: list[tuple[str, Any]], write: Any) -> list[str]:
    """What ended otherwise than it may, over all mutations."""
    found = []
    for name, value in cases:
        write(value)
        result = CliRunner().invoke(app, command)
        said = " ".join(result.stderr.split())
        if result.exit_code == 0:
            continue
        if result.exit_code != 2 or "error:" not in said or "Traceback" in said:
            found.append(f"{name}: exit {result.exit_code}: {result.exception!r} {said[-300:]}")
        elif len(said) > 1200:
            found.append(f"{name}: {len(said)} characters: {said[:200]}")
    return found


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["plain", "attached"])
@pytest.mark.parametrize("every", EVERY)
def test_files_of_a_model(folder: Path, kind: str, file: str, every: int) -> None:
    model = folder if kind == "plain" else folder / "attached"
    options = ["--indexers", str(folder / "indexers.safetensors")] if kind == "plain" else []
    command = ["generate", str(model), "--prompt", "Some words that are read.", "--max-new-tokens", "1", *options]
    before = (model / file).read_text()
    plain = json.loads(before)
    cases = list(mutations(plain))
    if kind == "attached":
        cases = [case for case in cases if case[0].startswith(("dsa", "whole", "auto_map", "model_type"))]
    try:
        assert not complaints(command, cases[::every], lambda value: (model / file).write_text(dumps(value)))
    finally:
        (model / file).write_text(before)


@pytest.mark.parametrize("field", ["config", "base_model", "trained"])
@pytest.mark.parametrize("every", EVERY)
def test_an_indexer_file(folder: Path, field: str, every: int) -> None:
    file = folder / "indexers.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    command = ["generate", str(folder), "--indexers", str(file), "--prompt", "Some words.", "--max-new-tokens", "1"]

    def write(value: Any) -> None:
        save_file(weights, file, metadata={**metadata, field: dumps(value)})

    try:
        assert not complaints(command, list(mutations(json.loads(metadata[field]), depth=2))[::every], write)
    finally:
        save_file(weights, file, metadata=metadata)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"hidden_size": 0}, "has hidden_size = 0, expected greater than or equal to 1"),
        ("config.json", {"num_attention_heads": 0}, "has num_attention_heads = 0, expected greater than or equal to 1"),
        ("config.json", {"model_type": ["llama"]}, "has model_type = ['llama'], expected a valid string"),
        ("config.json", {"num_hidden_layers": 10**9}, "expected less than or equal to 10000"),
        ("config.json", {"num_hidden_layers": 9999}, "is 9,999, but its files have only 21 tensors"),
        ("config.json", {"vocab_size": 1 << 26}, "embed_tokens.weight is [259, 32] in"),
        ("config.json", {"x": "<deep>"}, "is nested too deeply"),
        ("tokenizer.json", {"x": "<deep>"}, "is nested too deeply"),
        ("attached/config.json", {"dsa": []}, "has dsa = [], expected an object"),
        ("attached/config.json", {"dsa": {"layers": [1]}}, "has dsa.layers = [1], expected an object"),
        ("attached/config.json", {"dsa": {"index_heads": 10**6}}, "layers.0.self_attn.indexer"),
    ],
)
def test_what_was_found_once(folder: Path, file: str, changes: dict[str, Any], expected: str) -> None:
    before = (folder / file).read_text()
    (folder / file).write_text(dumps({**json.loads(before), **changes}))
    try:
        result = CliRunner().invoke(app, ["generate", str((folder / file).parent), "--prompt", "Some words."])
    finally:
        (folder / file).write_text(before)
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("config", [], "has content = [], expected an object"),
        ("config", {"layers": [1]}, "has layers = [1], expected an object"),
        ("config", {"index_heads": 10**6, "index_head_dim": 8}, "index_heads=1000000, index_head_dim=8"),
        ("config", {"index_heads": 2, "index_head_dim": 16}, "index_heads=2, index_head_dim=16"),
        ("base_model", None, "has content = None, expected an object"),
        ("tensor", "x", "has x, which is no weight of an indexer"),
    ],
)
def test_what_was_found_once_in_indexer_files(
    folder: Path, tmp_path: Path, field: str, value: Any, expected: str
) -> None:
    with safe_open(folder / "indexers.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if field == "tensor":
        weights[value] = weights[min(weights)].clone()
    save_file(weights, tmp_path / "a.safetensors", metadata={**metadata, field: json.dumps(value)})
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    with pytest.raises(ValueError, match=rf"^indexers: .*{re.escape(expected)}.*; copy it again, or train new ones$"):
        dsa.attach(model, indexers=tmp_path / "a.safetensors")
    assert not dsa.is_attached(model)
