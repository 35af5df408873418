"""The embedded SmolLM2-135M: reading everything is dense attention, and saving keeps every bit."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import dsa
from dsa.models.loading import load_model
from dsa.runs.inputs import encode, read_document

pytestmark = pytest.mark.default_model

TOKENS = 2048


@pytest.fixture(scope="module")
def document() -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The model, 2,048 tokens of the Python language reference, and the dense logits of every fourth."""
    loaded = load_model("default")
    tokens = encode(read_document(), loaded.tokenizer, TOKENS)
    return loaded.model, tokens, some_logits(loaded.model, tokens)


@pytest.fixture
def model(document: tuple) -> Iterator[PreTrainedModel]:
    yield document[0]
    if dsa.is_attached(document[0]):
        dsa.detach(document[0])


def some_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False, logits_to_keep=torch.arange(3, tokens.shape[1], 4)).logits


@pytest.mark.parametrize("dense_shortcut", [True, False], ids=["dense shortcut", "sparse path"])
def test_reading_everything_equals_dense(model: PreTrainedModel, document: tuple, dense_shortcut: bool) -> None:
    _, tokens, dense = document
    dsa.attach(model, indexers="default", top_k=TOKENS, dense_shortcut=dense_shortcut)
    assert (some_logits(model, tokens) - dense).abs().max() <= 1e-3


def test_saved_model_gives_identical_logits_in_a_fresh_process(
    model: PreTrainedModel, document: tuple, tmp_path: Path
) -> None:
    tokens = document[1][:, :600]
    dsa.attach(model, indexers="default", top_k=256, local=64)
    model.save_pretrained(tmp_path / "model")
    code = f"""
import dsa, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
torch.set_num_threads({torch.get_num_threads()})
tokens = torch.tensor({tokens.tolist()})
with torch.no_grad():
    logits = model(tokens, use_cache=False, logits_to_keep=torch.arange(3, 600, 4)).logits
save_file({{"logits": logits}}, {str(tmp_path / "logits.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], some_logits(model, tokens))
