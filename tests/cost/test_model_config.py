"""Sizes read from configurations: against real models' parameters, published totals, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dsa import DSAConfig, attach
from dsa.cli.cost import saved_config
from dsa.cost import model_config, read_model, shape_from
from dsa.cost.presets import PRESETS
from dsa.models.families import ATTACHABLE, FAMILIES, full_attention_layers
from dsa.testing.tiny_models import tiny_model

PUBLISHED = {
    "Llama-3-8B": (8.03e9, None),
    "Qwen3-0.6B": (0.596e9, None),
    "Qwen3-8B": (8.19e9, None),
    "Qwen3-32B": (32.8e9, None),
    "Qwen3-30B-A3B": (30.5e9, 3.3e9),
    "SmolLM2-135M": (134.5e6, None),
    "SmolLM2-360M": (362e6, None),
    "SmolLM2-1.7B": (1.71e9, None),
    "DeepSeek-V3": (671e9, 37e9),
    "DeepSeek-V3.2": (671e9, 37e9),
    "GLM-5": (744e9, 40e9),
}
"""Parameters in all, and active ones with the embedding's, as the models' makers give them."""


def test_every_preset_has_the_parameters_that_its_makers_publish() -> None:
    assert set(PUBLISHED) == set(PRESETS)
    for name, (parameters, active) in PUBLISHED.items():
        shape, _ = read_model(name.upper())
        assert shape.parameters == pytest.approx(parameters, rel=0.005)
        if active is not None:
            assert shape.active_parameters == pytest.approx(active, rel=0.09), name


@pytest.mark.parametrize("model_type", sorted(set(ATTACHABLE) & set(model_config.FAMILIES)))
def test_every_family_against_a_model(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.config.save_pretrained(tmp_path)
    shape, config = read_model(str(tmp_path), saved_config)
    assert config is None
    skipped = ("wpe.weight",)  # GPT-2's positions are added, not multiplied
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    sizes = [weight.numel() for name, weight in weights.items() if not name.endswith((*skipped, "bias"))]
    assert shape.parameters == sum(sizes)
    full = full_attention_layers(model.config)
    assert shape.full_layers == tuple(number for number, is_full in enumerate(full) if is_full)
    assert len(shape.layers) == len(FAMILIES[model_type].attention_layers(model))


def test_a_window_without_a_list_of_layers_is_not_guessed() -> None:
    raw = {**PRESETS["Llama-3-8B"], "model_type": "olmo3", "sliding_window": 4096}
    with pytest.raises(ValueError, match="the field 'layer_types' is missing"):
        shape_from(raw, "mine")


def test_experts_in_some_layers(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    widths = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 97}
    config = Qwen3MoeConfig(**sizes, **experts, **widths)
    config.save_pretrained(tmp_path)
    shape, _ = read_model(str(tmp_path / "config.json"))
    model = Qwen3MoeForCausalLM(config)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    assert [layer.feed_forward.experts for layer in shape.layers] == [0, 4, 0, 0]
    block = shape.layers[1].feed_forward
    assert block.active_parameters == 3 * 32 * 2 * 16 + 32 * 4


def test_an_attached_model_brings_its_own_budget(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach(model, DSAConfig(top_k=12, index_heads=2, index_head_dim=8, sinks=1, local=2, layers={1: {"share": 0}}))
    model.save_pretrained(tmp_path)
    shape, config = read_model(str(tmp_path), saved_config)
    assert shape.model_type == "llama"
    assert config is not None
    assert (config.top_k, config.shared_with(1)) == (12, 0)


def test_the_default_model_brings_the_shipped_budget() -> None:
    shape, config = read_model("default", saved_config)
    assert len(shape.layers) == 30
    assert config is not None
    assert config.is_dense(0)


def test_trained_in_selections_and_who_shares_them() -> None:
    raw = PRESETS["GLM-5"]
    assert shape_from(raw, "GLM").trained_dsa == DSAConfig(2048, 32, 128, sinks=0, local=0)
    some: dict[str, Any] = {**raw, "num_hidden_layers": 6}
    periodic = shape_from({**some, "index_topk_freq": 2}, "GLM").trained_dsa
    assert periodic is not None
    assert [periodic.shared_with(layer) for layer in range(6)] == [None, None, 1, None, 3, None]
    listed = shape_from(
        {**some, "indexer_types": ["full", "shared", "shared", "full", "shared", "full"]}, "GLM"
    ).trained_dsa
    lettered = shape_from({**some, "index_topk_pattern": "FSSFSF"}, "GLM").trained_dsa
    assert listed == lettered
    assert listed is not None
    assert [listed.shared_with(layer) for layer in range(6)] == [None, 0, 0, None, 3, None]


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "model_type"])
def test_a_missing_size_is_named(field: str) -> None:
    raw = {name: size for name, size in PRESETS["Llama-3-8B"].items() if name != field}
    with pytest.raises(ValueError, match=f"model mine: the field '{field}' is missing"):
        shape_from(raw, "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "the architecture 'mamba' is not known; known are apertus, arcee"),
        ({"hidden_size": "wide"}, "hidden_size must be a whole number of at least 1, got 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 must divide num_attention_heads 32"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list with one word for each of 32 layers, got 1"),
        ({"layer_types": ["odd"] * 32}, "layer_types holds 'odd'; known are full_attention"),
        ({"num_attention_heads": 33}, "'head_dim' is missing, and hidden_size 4096 is no multiple of 33 heads"),
    ],
)
def test_mistakes_in_a_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_from({**PRESETS["Llama-3-8B"], **changes}, "mine")


def test_mistakes_in_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no preset 'Lama-3-8B'; near it are Llama-3-8B"):
        read_model("Lama-3-8B")
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        read_model("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_model(str(tmp_path))
    for text, message in (("{", "is not JSON"), ("[1]", "expected an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_model(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["SmolLM2-360M"]))
    assert read_model(str(tmp_path))[0].hidden == 960


def test_a_configuration_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched is the file as it stands, not what a configuration class makes of it."""
    files = {"org/whole": PRESETS["Qwen3-0.6B"], "org/part": {"model_type": "llama", "hidden_size": 64}}

    def fetch(cls: type, name: str, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if name not in files:
            raise OSError("We couldn't connect to the Hub")
        return dict(files[name]), {}

    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", classmethod(fetch))
    assert read_model("org/whole")[0].hidden == 1024
    with pytest.raises(ValueError, match="model org/part: the field 'num_hidden_layers' is missing"):
        read_model("org/part")
    with pytest.raises(OSError, match="the Hub has no configuration of it or cannot be reached"):
        read_model("org/none")


def test_the_text_part_of_a_model_that_sees() -> None:
    text = {name: value for name, value in PRESETS["SmolLM2-360M"].items() if name != "tie_word_embeddings"}
    raw = {"model_type": "some_vision_model", "text_config": text, "tie_word_embeddings": False}
    shape = shape_from(raw, "mine")
    assert (shape.model_type, shape.hidden, shape.tied) == ("llama", 960, False)


def test_a_broken_budget_of_an_attached_model() -> None:
    from dsa.cost.source import _read

    with pytest.raises(ValueError, match=r"the field dsa has content = 5, expected an object"):
        _read({**PRESETS["SmolLM2-360M"], "dsa": 5}, "mine")
    with pytest.raises(ValueError, match="has topk, a field that is not known here"):
        _read({**PRESETS["SmolLM2-360M"], "dsa": {"topk": 5}}, "mine")
