"""The evaluation as a whole: its keys, what it leaves behind, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from dsa import LayerConfig
from dsa.eval.evaluation import Evaluation, evaluate
from dsa.models import attach, config_of, is_attached, report_of, save_indexers
from dsa.models.loading import LoadedModel
from dsa.runs.inputs import Document
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

KEYS = [
    "model",
    "tokens",
    "top_k",
    "perplexity_dense",
    "perplexity_dsa",
    "perplexity_window",
    "mass_kept_dsa",
    "mass_kept_window",
    "mass_kept_oracle",
    "prefill_s_dense",
    "prefill_s_dsa",
    "decode_tokens_per_s_dense",
    "decode_tokens_per_s_dsa",
    "peak_rss_mb",
]
OPTIONS = {"top_k": 16, "local": 4, "sinks": 2, "index_heads": 2, "index_head_dim": 8}


def run(tiny: LoadedModel, document: Document, **options: object) -> Evaluation:
    return evaluate(tiny, document, **{"tokens": 80, "new_tokens": 6, **OPTIONS, **options})  # type: ignore[arg-type]


def test_json(tiny: LoadedModel, document: Document) -> None:
    plain = json.loads(json.dumps(run(tiny, document, layers={0: LayerConfig(dense=True)}).to_json(), allow_nan=False))
    assert [key for key in plain if key in KEYS] == KEYS
    assert (plain["model"], plain["tokens"], plain["top_k"]) == ("tiny", 80, 16)
    assert all(isinstance(plain[key], float) for key in KEYS[3:])
    assert (plain["prompt_tokens"], plain["new_tokens"], plain["start"], plain["evaluated_tokens"]) == (74, 6, 40, 33)
    assert (plain["layers_dense"], plain["layers_sparse"], len(plain["layers"])) == ([0], [1], 1)
    assert plain["mass_kept_dsa"] == plain["layers"][0]["dsa"]
    assert plain["perplexity_ratio_dsa"] == plain["perplexity_dsa"] / plain["perplexity_dense"]
    assert plain["tokens_read_mean_dense"] == pytest.approx((41 + 74) / 2)
    assert (plain["tokens_read_max_dense"], plain["tokens_read_max_dsa"], plain["tokens_read_max_window"]) == (
        74,
        16,
        16,
    )
    assert plain["peak_rss_mb"] >= max(plain[f"peak_rss_mb_{name}"] or 0.0 for name in ("dense", "dsa", "window"))
    assert plain["indexers_trained"] is False
    assert {"commit", "machine", "threads", "torch", "transformers"} <= set(plain["environment"])
    assert set(plain["continuations"]) == {"dense", "dsa", "window"}


def test_everything_selected_is_dense(tiny: LoadedModel, document: Document) -> None:
    result = run(tiny, document, top_k=80)
    assert result.dsa.perplexity == pytest.approx(result.dense.perplexity, rel=1e-5)
    assert result.window.perplexity == pytest.approx(result.dense.perplexity, rel=1e-5)
    assert result.dsa.continuation == result.dense.continuation == result.window.continuation
    assert result.mass("dsa") == pytest.approx(1.0)


def test_all_layers_dense(tiny: LoadedModel, document: Document) -> None:
    result = run(tiny, document, layers={0: LayerConfig(dense=True), 1: LayerConfig(dense=True)})
    assert result.to_json()["mass_kept_dsa"] is None
    assert result.window.perplexity == pytest.approx(result.dense.perplexity, rel=1e-6)


def test_shared_layers_are_named(tiny: LoadedModel, document: Document) -> None:
    result = run(tiny, document, layers={1: LayerConfig(share=0)})
    assert result.layers_of("shared") == [1]
    assert [row.layer for row in result.layers] == [0]
    assert result.tokens_read("dsa") == (16, 16)
    assert result.budgets() == [16]


def test_tokens_read_by_layers_that_differ(tiny: LoadedModel, document: Document) -> None:
    result = run(tiny, document, layers={0: LayerConfig(top_k=8)})
    assert result.budgets() == [8, 16]
    assert result.tokens_read("dsa") == result.tokens_read("window") == (12, 16)
    assert result.tokens_read_everywhere() == 12
    result = run(tiny, document, layers={0: LayerConfig(dense=True)})
    assert result.tokens_read_everywhere() == pytest.approx((result.tokens_read("dense")[0] + 16) / 2)


def test_the_shortest_text(tiny: LoadedModel) -> None:
    result = run(tiny, Document("ab", "two bytes"), tokens=None)
    assert (result.tokens, result.prompt_tokens, result.new_tokens, result.dense.evaluated) == (2, 2, 0, 1)
    assert result.to_json()["decode_tokens_per_s_dsa"] is None


def test_more_positions_than_trained(tiny: LoadedModel, document: Document) -> None:
    with pytest.warns(UserWarning, match="positions that"):
        result = run(tiny, document, tokens=300)
    assert result.extrapolated == 44


def test_a_plain_model_is_left_plain(tiny: LoadedModel, document: Document) -> None:
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    run(tiny, document)
    assert not is_attached(tiny.model)
    assert tiny.model.config._attn_implementation == "sdpa"
    after = tiny.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_attached_model_keeps_its_indexers(tiny: LoadedModel, document: Document) -> None:
    attach(tiny.model, TINY_CONFIG)
    weight = tiny.model.model.layers[1].self_attn.indexer.wk.weight.clone()
    result = evaluate(tiny, document, tokens=80, top_k=20)
    assert (result.top_k, result.report.trained) == (20, False)
    assert config_of(tiny.model) == TINY_CONFIG
    assert torch.equal(tiny.model.model.layers[1].self_attn.indexer.wk.weight, weight)
    assert not report_of(tiny.model).trained


def test_trained_indexers_are_read(tiny: LoadedModel, document: Document, tmp_path: Path) -> None:
    attach(tiny.model, TINY_CONFIG)
    file = save_indexers(tiny.model, tmp_path, trained=True)
    other = LoadedModel(tiny_model("llama", vocab_size=BYTE_VOCABULARY), tiny_tokenizer(), "other", False)
    result = evaluate(other, document, tokens=80, indexers=file)
    assert (result.indexers, result.report.trained) == (str(file), True)
    own = evaluate(tiny, document, tokens=80)
    assert own.dsa.perplexity == result.dsa.perplexity


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 5}, "top_k must be at least sinks"),
        ({"tokens": 10_000}, "a text has only"),
        ({"start": 73}, "start must lie in 0 to 72"),
        ({"indexers": "missing.safetensors"}, "indexers: no file at missing"),
    ],
)
def test_refused_before_anything_runs(
    tiny: LoadedModel, document: Document, options: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsa.eval.evaluation.read", lambda *args, **kwargs: pytest.fail("a pass began"))
    with pytest.raises((ValueError, OSError), match=expected):
        run(tiny, document, **options)
    assert not is_attached(tiny.model)


def test_a_failure_leaves_the_model_as_it_was(
    tiny: LoadedModel, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsa.eval.evaluation.read", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, document)
    assert not is_attached(tiny.model)
