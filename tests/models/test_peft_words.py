"""What a person who comes with PEFT is told."""

import subprocess
import sys

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants

import dsa
from dsa.models.attached import indexers_of
from dsa.models.families import ATTACHABLE
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens


def test_the_model_inside_is_attached() -> None:
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"got PeftModel; .* pass model\.get_base_model\(\)"):
        dsa.attach(wrapped)
    dsa.attach(wrapped.get_base_model(), TINY_CONFIG)
    assert wrapped(tiny_tokens(1, 30)).logits.shape[1] == 30
    with pytest.raises(TypeError, match=r"got str$"):
        dsa.attach("a model")


def test_prefix_tuning_is_refused_with_its_reason() -> None:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="prefix tuning, whose keys and values come from no text"):
        tuned(tiny_tokens(1, 30))


def test_attention_weights_are_refused() -> None:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(ValueError, match="output_attentions: sparse attention keeps no weights"):
        model(tiny_tokens(1, 30), output_attentions=True)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("method", [peft.LoraConfig, peft.LoHaConfig, peft.IA3Config])
def test_all_linear_leaves_the_indexers_alone(family: str, method: type) -> None:
    model = tiny_model(family)
    dense = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    dsa.attach(model, TINY_CONFIG)
    more = {"feedforward_modules": []} if method is peft.IA3Config else {}
    peft.get_peft_model(model, method(target_modules="all-linear", **more))
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted == dense - {"lm_head"}
    assert indexers_of(model)


def test_adapters_named_for_the_indexers_are_refused() -> None:
    """They would get no gradient."""
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG)
    with pytest.raises(ValueError, match=r"Target module IndexProjection.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "weights_proj"]))


ROWS = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


@pytest.mark.parametrize("model_type", [model_type for model_type in ATTACHABLE if model_type in ROWS])
def test_without_target_modules_the_layers_of_the_family_are_adapted(model_type: str) -> None:
    model = tiny_model(model_type)
    dsa.attach(model, TINY_CONFIG)
    expected = [
        name for name, _ in model.named_modules() if name.endswith(tuple(f".{row}" for row in ROWS[model_type]))
    ]
    assert peft.get_peft_model(model, peft.LoraConfig()).targeted_module_names == expected
    assert expected


PEFT_LATER = """
import sys
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
import dsa
model = tiny_model("llama")
dsa.attach(model, TINY_CONFIG)
assert "peft" not in sys.modules
import peft
adapted = peft.get_peft_model(model, peft.LoraConfig())
assert len(adapted.targeted_module_names) == 2 * len(model.model.layers)
table = sys.modules["peft.utils.constants"].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
assert [key for key in table if key.startswith("dsa_")] == ["dsa_llama"]
"""


def test_without_target_modules_where_peft_is_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", PEFT_LATER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
