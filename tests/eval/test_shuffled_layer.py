"""A layer whose indexer weights were shuffled is the one that the evaluation points at."""

from typing import Any

import pytest
import torch

from dsa.config import DSAConfig
from dsa.eval.tasks import run_tasks
from dsa.models import attach, indexers_of
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.loading import LoadedModel
from dsa.runs.inputs import Document
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer
from dsa.train.start import fit_indexer

LAYERS = 6
TOKENS = 480
CONFIG = DSAConfig(top_k=24, index_heads=2, index_head_dim=32, sinks=1, local=2, index_dtype="fp32")
TEXT = (
    "The keeper of the lighthouse counted eleven sails before noon; then the wind turned, and he went down to mend "
    "the boat. On the table lay a letter from his sister, unopened, beside the bread and the oil. What she wrote can "
    "be told in few words: the orchard is sold, the goat is well, and nobody has found the key to the green suitcase. "
    "He read it twice that evening, by the lamp, and once more in the morning! Would he go? The ferry leaves at six, "
    "and a man who counts ships for a living knows how long it takes. "
)


@pytest.fixture(scope="module")
def fitted() -> LoadedModel:
    """A tiny model whose indexers are fitted in closed form to what its layers attend to."""
    sizes = {"num_hidden_layers": LAYERS, "intermediate_size": 32, "max_position_embeddings": TOKENS}
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, **sizes)
    attach(model, CONFIG)
    tokenizer = tiny_tokenizer()
    calls: dict[int, AttentionCall] = {}
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :TOKENS]
    context = DSAContext(mode="dense", observer=lambda call: calls.__setitem__(call.layer, call))
    with torch.no_grad():
        model(ids, use_cache=False, dsa_context=context)
    for layer, call in calls.items():
        rows = torch.arange(CONFIG.top_k, TOKENS)
        fit_indexer(indexers_of(model)[layer], call, rows, CONFIG.sinks, CONFIG.layer_local(layer))
    return LoadedModel(model, tokenizer, "tiny", False)


def suspects(loaded: LoadedModel) -> list[Any]:
    found = run_tasks(loaded, [Document(TEXT, "a text")], ["mass"], tokens=TOKENS)
    return [row["layer"] for row in found["suspect_layers"]]


def test_fitted_layers_are_alike(fitted: LoadedModel) -> None:
    assert suspects(fitted) == []


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_shuffled_layer_is_named(fitted: LoadedModel, layer: int) -> None:
    indexer = indexers_of(fitted.model)[layer]
    before = {name: weight.clone() for name, weight in indexer.state_dict().items()}
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for weight in indexer.parameters():
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    try:
        assert suspects(fitted) == [layer]
    finally:
        # The evaluation takes the indexers off and puts them on again, as new modules.
        indexers_of(fitted.model)[layer].load_state_dict(before)
