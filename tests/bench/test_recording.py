"""Tensors recorded from a model are those that its layer reads."""

from pathlib import Path

import pytest
import torch

import dsa
from dsa.bench import recording
from dsa.bench.recording import long_ids, record_layer
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.loading import LoadedModel
from dsa.ops import QuantizedKeys
from dsa.runs.progress import silent
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    dsa.attach(model, top_k=24, local=4)
    return LoadedModel(model, tiny_tokenizer(), "tiny", False)


def test_chunks_give_what_one_forward_gives(loaded: LoadedModel) -> None:
    found = record_layer(loaded, 100, progress=silent, chunk=33)
    layer = int(found.source.split()[1])
    calls: dict[int, AttentionCall] = {}
    with torch.no_grad():
        context = DSAContext(observer=lambda call: calls.update({call.layer: call}))
        loaded.model(long_ids(loaded.tokenizer, 100), use_cache=False, dsa_context=context)
    call = calls[layer]
    tensors = found.tensors
    torch.testing.assert_close(tensors.query, call.query)
    torch.testing.assert_close(tensors.key, call.key)
    torch.testing.assert_close(tensors.value, call.value)
    torch.testing.assert_close(tensors.index_query, call.index_query)
    torch.testing.assert_close(tensors.index_weight, call.index_weight)
    assert isinstance(call.index_key, QuantizedKeys)
    torch.testing.assert_close(tensors.index_key.dequantize(), call.index_key.dequantize(), atol=0.05, rtol=0)
    assert (found.sizes.top_k, found.sizes.local) == (24, 4)


def test_a_short_text_is_continued(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.bench.recording.read_document", lambda path: recording.Document("abc", "letters"))
    ids = long_ids(loaded.tokenizer, 20)
    assert ids.shape == (1, 20)
    assert loaded.tokenizer.decode(ids[0]).startswith("abc\n\nabc\n\nabc")


def test_a_recording_is_kept_and_read_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSA_CACHE", str(tmp_path))
    monkeypatch.setattr(recording, "_digest", lambda: "digest")
    monkeypatch.setattr(recording, "load_model", lambda *args, **options: pytest.fail("the model was loaded"))
    for tokens in (40, 64):
        made = record_layer(loaded, tokens, progress=silent)
        recording._keep(made)
    assert [file.name for file in (tmp_path / "bench").iterdir()] == ["digest-64.safetensors"]
    found = recording.recording("default", 50, top_k=None, status=lambda message: None, progress=silent)
    assert found.sizes == made.sizes
    assert torch.equal(found.tensors.query, made.tensors.query)
    assert torch.equal(found.tensors.index_key.data, made.tensors.index_key.data)
    narrower = recording.recording("default", 50, top_k=12, status=lambda message: None, progress=silent)
    assert (narrower.sizes.top_k, narrower.sizes.local) == (12, 3)
