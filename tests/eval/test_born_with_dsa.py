"""Models born with DSA, measured: their own selection beside all tokens and beside other selections."""

import json
from collections.abc import Callable

import pytest
import torch

import dsa
from dsa.cli.comparison_table import remarks
from dsa.eval.comparison import contexts, text_losses
from dsa.eval.evaluation import evaluate
from dsa.eval.selections import SELECTIONS, window
from dsa.eval.tasks import NeedleOptions, run_tasks
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.loading import LoadedModel
from dsa.models.sparse import sparse_report_of
from dsa.runs.inputs import Document
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

FAMILIES = ["deepseek_v32", "glm_moe_dsa"]


@pytest.fixture
def load() -> Callable[..., LoadedModel]:
    def make(family: str, **changes: object) -> LoadedModel:
        model = born_model(family, vocab_size=BYTE_VOCABULARY, **changes)
        return LoadedModel(model, tiny_tokenizer(), "tiny", False)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_comparison(load: Callable[..., LoadedModel], document: Document, family: str) -> None:
    loaded = load(family)
    found = evaluate(loaded, document, tokens=80, new_tokens=6)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (plain["top_k"], plain["indexers"], plain["indexers_trained"]) == (8, "tiny", True)
    assert (plain["born_with_dsa"], plain["dense_attention"]) == (True, "absorbed")
    assert plain["layers_shared"] == ([1] if family == "glm_moe_dsa" else [])
    assert plain["mass_kept_oracle"] >= plain["mass_kept_dsa"] > 0
    assert plain["tokens_read_max_window"] == 8
    assert any("was born with DSA" in each for each in remarks(found))
    assert not dsa.is_accelerated(loaded.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_dsa_is_the_model_and_dense_is_the_model_that_selects_everything(
    load: Callable[..., LoadedModel], document: Document, family: str
) -> None:
    loaded = load(family)
    ids = loaded.tokenizer(document.text, return_tensors="pt")["input_ids"][:, :80]
    found = run_tasks(loaded, [document], ["perplexity"], tokens=80)["perplexity"]
    with torch.no_grad():
        own = loaded.model(ids).logits[0, 40:79].log_softmax(-1).gather(1, ids[0, 41:, None]).mean()
    assert found["dsa"]["perplexity"] == pytest.approx(float((-own).exp()), rel=1e-4)
    everything = load(family, index_topk=80)
    with torch.no_grad():
        dense = everything.model(ids).logits[0, 40:79].log_softmax(-1).gather(1, ids[0, 41:, None]).mean()
    assert found["dense"]["perplexity"] == pytest.approx(float((-dense).exp()), rel=1e-4)
    assert found["dense"]["perplexity"] != found["dsa"]["perplexity"]


def test_every_task(load: Callable[..., LoadedModel], document: Document) -> None:
    loaded = load("glm_moe_dsa")
    runs = [run_tasks(loaded, [document], ["mass", "agreement"], tokens=80, top_k=12, local=3) for _ in range(2)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1]
    assert (runs[0]["config"]["top_k"], runs[0]["config"]["local"], runs[0]["born_with_dsa"]) == (12, 3, True)
    assert [row["layer"] for row in runs[0]["mass"]["layers"]] == [0, 2]
    assert set(runs[0]["mass"]["kept"]) == {"dsa", *SELECTIONS}
    kept = runs[0]["mass"]["kept"]
    assert kept["oracle"] == max(kept.values())
    assert set(runs[0]["agreement"]) == {"dsa", *SELECTIONS}


def test_needles(load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.eval.tasks.HAYSTACKS", 1)
    loaded = load("deepseek_v32", max_position_embeddings=4096)
    text = Document("It was a quiet day, and nothing much went on. Nobody minded that! " * 40, "a text")
    found = run_tasks(loaded, [text], ["needles"], tokens=60, needles=NeedleOptions([1600]))
    assert [row["reader"] for row in found["needles"]] == ["dsa", *SELECTIONS]
    assert found["needles"][0]["cells"][-1]["asked"] == 10


def test_the_best_keys_of_the_latents_are_those_of_the_expanded_attention(
    load: Callable[..., LoadedModel], document: Document
) -> None:
    """Mass, oracle and blocks read scores off the latent rows: they are the scores that transformers expands."""
    loaded = load("deepseek_v32", num_hidden_layers=1, index_topk=80)
    ids = loaded.tokenizer(document.text, return_tensors="pt")["input_ids"][:, :40]
    with torch.no_grad():
        expected = loaded.model(ids, output_attentions=True).attentions[0]
    calls: list[AttentionCall] = []
    dsa.accelerate(loaded.model)
    with torch.no_grad():
        loaded.model(ids, dsa_context=DSAContext(mode="dense", observer=calls.append))
    (call,) = calls
    scores = call.scale * torch.einsum("bthd,bsgd->bhts", call.query, call.key)
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    torch.testing.assert_close(scores.masked_fill(hidden, -torch.inf).softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_a_selection_is_asked_in_blocks(
    load: Callable[..., LoadedModel], document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the text, the queries that are held at once stay few."""
    loaded = load("glm_moe_dsa")
    ids = loaded.tokenizer(document.text, return_tensors="pt")["input_ids"][:, :80]
    config = dsa.accelerate(loaded.model).config
    whole = {name: text_losses(loaded.model, ids, 40, contexts(name, config)) for name in ("window", "oracle")}
    monkeypatch.setattr("dsa.models.latent.attention.QUERY_BYTES", 4 * 4 * 28 * 7)
    for name, losses in whole.items():
        found = text_losses(loaded.model, ids, 40, contexts(name, config))
        torch.testing.assert_close(found, losses, atol=1e-5, rtol=1e-5)
    asked: list[int] = []

    def select(call: AttentionCall) -> torch.Tensor:
        asked.append(call.query.shape[1])
        return window(call, 8)

    text_losses(loaded.model, ids, 40, lambda: DSAContext(select=select))
    assert asked == [*[7] * 11, 3] * 3


def test_a_compact_cache_is_measured(load: Callable[..., LoadedModel], document: Document) -> None:
    """Perplexity is that of rounded rows though the text is short enough to be read without a cache."""
    loaded = load("deepseek_v32")
    plain, rounded = (
        run_tasks(loaded, [document], ["perplexity"], tokens=80, cache=cache) for cache in ("full", "fp8")
    )
    assert (plain["cache"], rounded["cache"]) == ("full", "fp8")
    assert plain["perplexity"]["dsa"] != rounded["perplexity"]["dsa"]
    assert rounded["perplexity"]["dsa"]["perplexity"] == pytest.approx(
        plain["perplexity"]["dsa"]["perplexity"], rel=0.1
    )
    found = evaluate(loaded, document, tokens=80, new_tokens=2, cache="fp8", index_dtype="int8")
    assert found.report.config.index_dtype == "int8"
    assert "FP8 rows" in str(found.report)


def test_only_latents_have_a_compact_cache(tiny: LoadedModel, document: Document) -> None:
    with pytest.raises(ValueError, match=r"cache: tiny was not born with DSA.*'fp8'"):
        evaluate(tiny, document, tokens=80, cache="fp8")


def test_an_accelerated_model_stays_as_it_was_given(load: Callable[..., LoadedModel], document: Document) -> None:
    loaded = load("deepseek_v32")
    dsa.accelerate(loaded.model, cache="fp8", top_k=6)
    found = run_tasks(loaded, [document], ["mass"], tokens=80)
    assert found["top_k"] == 6
    assert evaluate(loaded, document, tokens=80, new_tokens=2, top_k=9).top_k == 9
    report = sparse_report_of(loaded.model)
    assert report.config.top_k == 6
    assert "FP8 rows" in str(report)


def test_indexers_are_refused(load: Callable[..., LoadedModel], document: Document) -> None:
    loaded = load("deepseek_v32")
    for measure in (evaluate, lambda *args, **options: run_tasks(*args, ["mass"], **options)):
        with pytest.raises(ValueError, match="tiny has indexers of its own"):
            measure(loaded, document if measure is evaluate else [document], tokens=80, indexers="runs/other")
    assert not dsa.is_accelerated(loaded.model)
