"""What a person who comes with PEFT is told."""

import peft
import pytest

import dsa
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
