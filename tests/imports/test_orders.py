"""dsa and transformers, imported in every order: what is imported, and how, stays what it is without dsa."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

import dsa
from dsa.models.families import ATTACHABLE
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

A_FEW = (
    "AutoConfig",
    "BertModel",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "PreTrainedModel",
    "T5Model",
)
OTHERS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "BloomForCausalLM",
    "CLIPModel",
    "DebertaV2Model",
    "DeepseekV32ForCausalLM",
    "DistilBertModel",
    "ElectraModel",
    "FalconForCausalLM",
    "GenerationConfig",
    "GlmMoeDsaForCausalLM",
    "LlavaForConditionalGeneration",
    "MambaForCausalLM",
    "MarianMTModel",
    "OPTForCausalLM",
    "PegasusForConditionalGeneration",
    "PreTrainedConfig",
    "Qwen2VLModel",
    "RobertaModel",
    "SamModel",
    "SiglipModel",
    "T5ForConditionalGeneration",
    "Trainer",
    "ViTModel",
    "Wav2Vec2Model",
    "WhisperModel",
    "XLNetModel",
    "pipeline",
)
ALL = sorted(
    {*A_FEW, *OTHERS}
    | {family.causal_lm for family in ATTACHABLE.values()}
    | {family.causal_lm.replace("ForCausalLM", "Model").replace("LMHead", "") for family in ATTACHABLE.values()}
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an attached model and a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    dsa.attach(model, TINY_CONFIG)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "name", [name if name in A_FEW else pytest.param(name, marks=pytest.mark.nightly) for name in ALL]
)
def test_nothing_else_is_imported_and_nothing_in_another_order(name: str, forked, saved: str) -> None:
    class_itself = f"from transformers import {name}; before = models_imported()"
    loading = f"from transformers import AutoConfig; loaded = AutoConfig.from_pretrained({saved!r}).model_type"
    told = {
        "alone": forked(
            [class_itself, "import dsa; after = models_imported()", loading, "result = before, after, loaded"]
        ),
        "after dsa": forked(["import dsa", class_itself, loading, "result = before, loaded"]),
    }
    for order, result in told.items():
        assert isinstance(result, list), f"{order}: {result}"
    (without, after, loaded), (first, loaded_first) = told.values()
    ours = ["dsa._auto_classes", "dsa.config", "dsa"]
    assert after == without + ours
    # The same modules, and each after the same ones.
    assert first == without + ours
    assert loaded == loaded_first == "dsa_llama"


def test_the_sweep_is_wide() -> None:
    assert len(ALL) > 70


LOAD = """
model = AutoModelForCausalLM.from_pretrained({saved!r})
tokenizer = AutoTokenizer.from_pretrained({saved!r})
result = [type(AutoConfig.from_pretrained({saved!r})).__name__, type(model).__name__, type(tokenizer).__name__,
          dsa.is_attached(model), AutoModelForCausalLM.from_config(model.config).config.model_type]
"""
NAMES = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer"
LOADED = ["DSALlamaConfig", "DSALlamaForCausalLM", "TokenizersBackend", True, "dsa_llama"]

# A finder before ours that finds transformers' modules itself, as pytest's, typeguard's and others' do.
TAKES_ALL = """
import sys
from importlib.machinery import PathFinder
class Takes:
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.startswith("transformers.models.auto.") else None
sys.meta_path.insert(0, Takes())
"""
# IPython's deep reload and autoreload import through a replaced `__import__` and reload what is there.
REPLACED = """
import builtins
usual = builtins.__import__
builtins.__import__ = lambda *arguments, **more: usual(*arguments, **more)
"""
RELOADED = """
import importlib, sys
for name in ("configuration_auto", "auto_factory", "modeling_auto", "tokenization_auto"):
    importlib.reload(importlib.import_module(f"transformers.models.auto.{name}"))
"""
THREADS = """
import importlib, threading
pieces = ["import dsa", "from transformers import AutoConfig", "from transformers import AutoModelForCausalLM",
          "from transformers import AutoTokenizer", "import dsa; dsa.attach"] * 2
failed, ready = [], threading.Barrier(len(pieces))
def go(piece):
    ready.wait()
    try:
        exec(piece)
    except Exception as error:
        failed.append(f"{piece}: {error!r}")
threads = [threading.Thread(target=go, args=(piece,)) for piece in pieces]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert not failed, failed
"""
LOADED_IN_THREADS = """
found = []
threads = [threading.Thread(target=lambda: found.append(type(AutoModelForCausalLM.from_pretrained({saved!r}))))
           for _ in range(6)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert len(found) == 6 and len(set(found)) == 1, found
"""
ORDERS = {
    "dsa first": ["import dsa", NAMES],
    "transformers first": [NAMES, "import dsa"],
    "a model class first": ["from transformers import LlamaForCausalLM", "import dsa", NAMES],
    "dsa, then a model class": ["import dsa", "from transformers import LlamaForCausalLM", NAMES],
    "dsa's own models first": ["import dsa; dsa.attach", NAMES],
    "the Auto module from dsa's import on": ["import transformers.models.auto, dsa", NAMES],
    "a finder before ours": ["import dsa", TAKES_ALL, NAMES],
    "a finder before dsa": [TAKES_ALL, "import dsa", NAMES],
    "a replaced import": [REPLACED, "import dsa", NAMES],
    "imported twice": ["import dsa, sys; del sys.modules['dsa'], sys.modules['dsa._auto_classes']; import dsa", NAMES],
    "reloaded": ["import dsa", RELOADED, NAMES],
    "threads": [THREADS, NAMES, "import dsa", LOADED_IN_THREADS],
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_saved_models_load_whichever_was_imported_first(order: str, forked, saved: str) -> None:
    told = forked([piece.replace("{saved!r}", repr(saved)) for piece in (*ORDERS[order], LOAD)])
    assert told == LOADED, told


@pytest.mark.parametrize("first", ["import dsa; from transformers import LlamaForCausalLM", NAMES])
def test_in_a_process_that_nothing_was_prepared_for(first: str, saved: str) -> None:
    code = "\n".join(
        [first, "import dsa, json", NAMES, LOAD.replace("{saved!r}", repr(saved)), "print(json.dumps(result))"]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == LOADED


def test_a_type_that_is_not_ours_is_unknown_as_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dsa_nothing_like_it"}')
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoConfig.from_pretrained(tmp_path)
    assert "dsa_llama" in AutoConfig.for_model("dsa_llama").model_type


@pytest.mark.parametrize("declared", [None, "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("model_type", list(ATTACHABLE))
def test_the_tokenizer_is_the_one_of_the_family(model_type: str, declared: str | None, tmp_path: Path) -> None:
    """transformers chooses the class of a tokenizer by the type of the model, too."""
    found = []
    for name in (model_type, f"dsa_{model_type}"):
        folder = tmp_path / name
        tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("tokenizer_class")
        if declared is not None:
            config["tokenizer_class"] = declared
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": name}))
        try:
            found.append(type(tokenization_auto.AutoTokenizer.from_pretrained(folder)).__name__)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}".replace(str(folder), "folder"))
    assert found[0] == found[1]
