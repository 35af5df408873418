"""`dsa check`: families found anew, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import dsa
from dsa.check import checking
from dsa.check.checking import check_config
from dsa.models import families
from dsa.models.families import ATTACHABLE, Family
from dsa.testing.tiny_models import ONE_OF_EACH_KIND, TINY_CONFIG, tiny_model, tiny_tokens

Run = Callable[..., Any]


def config_file(folder: Path, **fields: Any) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("model_type", [*ONE_OF_EACH_KIND, "exaone4", "nemotron_h"])
def test_a_family_out_of_the_table_is_found_again(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, row = tiny_model(model_type).config, ATTACHABLE[model_type]
    for place in (families, checking):
        monkeypatch.setattr(
            place, "ATTACHABLE", {name: each for name, each in ATTACHABLE.items() if name != model_type}
        )
    monkeypatch.setattr("dsa.check.claims.ATTACHABLE", families.ATTACHABLE)
    monkeypatch.setattr("dsa.models.saving.ATTACHABLE", families.ATTACHABLE)
    report = check_config(config)
    assert report.passed, report.outcomes[-1]
    assert (report.known, report.family) == (False, row)
    assert f"family=dsa.{report.row}" in report.verdict()


def test_the_command(dsa: Run, tmp_path: Path) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    result = dsa("check", str(tmp_path / "config.json"))
    assert result.exit_code == 0, result.output
    assert "sparse equals its reference holds" in " ".join(result.stdout.split())
    assert "Qwen3ForCausalLM is in the table" in result.stdout


def test_the_first_claim_that_fails(dsa: Run, tmp_path: Path) -> None:
    result = dsa("check", config_file(tmp_path, model_type="nemotron", num_key_value_heads=8), "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["claims"][-1]["claim"] == "sparse equals its reference"
    assert [each["result"] for each in found["claims"]] == ["holds", "fails"]
    assert "hand no keyword arguments" in found["verdict"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "an encoder"),
        ({"model_type": "t5"}, "is not a causal language model"),
        ({"model_type": "mamba"}, "nothing to select"),
        ({"model_type": "mistral", "sliding_window": 64}, "nothing to select"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}, "not a multiple of"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "a quantised checkpoint"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}, "transformers cannot read"),
        ({"hidden_size": 64}, "transformers cannot read"),
        ({"model_type": "deepseek_v32"}, "has indexers of its own"),
    ],
)
def test_what_is_refused(dsa: Run, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    result = dsa("check", config_file(tmp_path, **fields))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_attaching_by_a_row() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="'llama' is in the table already"):
        dsa.attach(model, TINY_CONFIG, family=Family("llama", rope="interleaved"))
    with pytest.raises(TypeError, match=r"family must be a dsa\.Family"):
        dsa.attach(model, TINY_CONFIG, family="llama")
    assert isinstance(AutoConfig.for_model("llama"), type(model.config))
    assert model(tiny_tokens(1, 4)).logits.shape == (1, 4, 97)
