"""Every family of the table keeps every claim of `dsa.check.claims`, on a tiny random model."""

import copy
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dsa
from dsa.check.claims import CLAIMS, IN_FP32, Case, NotTheModels, padding_changes_nothing
from dsa.check.discovery import find_family
from dsa.models.attached import indexers_of, report_of
from dsa.models.families import ATTACHABLE, FAMILIES, INSIDE, full_attention_layers
from dsa.models.refused import REFUSED
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model

HYBRIDS = {
    *("bamba", "granitemoehybrid", "jamba", "lfm2_moe", "lfm3", "minimax", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
}

NOT_THE_MODELS = {
    # A state runs on from one document to the next; the others take their positions from elsewhere.
    "packing": HYBRIDS | {"afmoe", "biogpt", "gpt_oss", "opt"},
    # Their states begin anew with a chunk of several tokens, or are computed in fp32 whatever the model's dtype.
    "cached equals uncached": {"bamba", "jamba", "qwen3_5_text"},
    "left padding": {"qwen3_5_text"},
    "chunked prefill": {"jamba", "minimax"},
}
"""What some models do not do with transformers' own attention either."""


@lru_cache(maxsize=2)
def made(model_type: str, dtype: torch.dtype) -> torch.nn.Module:
    return tiny_model(model_type).to(dtype)


def case_of(model_type: str, dtype: torch.dtype = torch.float64) -> Case:
    return Case(made(model_type, dtype), ATTACHABLE[model_type])


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("model_type", sorted(ATTACHABLE), scope="module")
def test_claim(model_type: str, claim: str) -> None:
    case = case_of(model_type, torch.float32 if claim in IN_FP32 else torch.float64)
    if model_type in NOT_THE_MODELS.get(claim, ()):
        with pytest.raises(NotTheModels, match="without dsa"):
            CLAIMS[claim](case)
    else:
        CLAIMS[claim](case)


@pytest.mark.parametrize("model_type", sorted(ATTACHABLE))
def test_row_is_found_and_layers_are_reported(model_type: str) -> None:
    model = made(model_type, torch.float32)
    assert find_family(model) == ATTACHABLE[model_type]
    full = full_attention_layers(model.config)
    assert any(full)
    report = dsa.attach(model, TINY_CONFIG)
    try:
        assert report is report_of(model)
        assert [row.kind == "sparse" for row in report.layers] == full
        assert sorted(indexers_of(model)) == [layer for layer, whole in enumerate(full) if whole]
        assert "UNTRAINED" in str(report)
    finally:
        dsa.detach(model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "deepseek_v3", "qwen3_next", "gemma2", "gpt_oss"])
def test_padding_on_the_right_changes_nothing(model_type: str) -> None:
    padding_changes_nothing(case_of(model_type), "right")


def test_every_causal_model_of_transformers_works_or_is_refused_with_a_reason() -> None:
    works = set(FAMILIES) | set(INSIDE)
    assert works.isdisjoint(REFUSED)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= works | set(REFUSED)
    assert works <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(INSIDE.values()) <= set(FAMILIES)
    assert len(works) >= 100


def test_the_page_of_families_is_current() -> None:
    command = [sys.executable, "scripts/families_page.py", "--check"]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_saved_classes_have_names_of_their_own() -> None:
    names = [family.saved_class for family in ATTACHABLE.values()]
    assert len(set(names)) == len(names)


def test_a_composite_configuration_is_that_of_the_family_inside() -> None:
    from transformers import AutoModelForCausalLM, Qwen3_5Config

    text = copy.deepcopy(made("qwen3_5_text", torch.float32).config)
    model = AutoModelForCausalLM.from_config(Qwen3_5Config(text_config=text.to_dict()))
    assert dsa.attach(model, TINY_CONFIG).count("sparse") == 1


def test_layers_that_stay_are_named() -> None:
    report = dsa.attach(tiny_model("qwen3_next"), TINY_CONFIG)
    assert [row.kind for row in report.layers] == ["other", "other", "other", "sparse"]
    assert "left as it is: linear attention or a state space" in str(report)
