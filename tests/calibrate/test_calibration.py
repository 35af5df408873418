"""A calibration as a whole: its result is what attaching honours, and what cannot be reached is said."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dsa
from dsa import LayerConfig
from dsa.calibrate.calibration import calibrate
from dsa.calibrate.result import Calibration
from dsa.calibrate.settings import CalibrationSettings, resolve_budgets
from dsa.cost import model_cost
from dsa.eval.evaluation import evaluate
from dsa.models import attach, config_of, indexers_of, is_attached, report_of, save_indexers
from dsa.models.loading import LoadedModel
from dsa.runs.inputs import Document

BUDGETS = (4, 8, 16, 32, 64)


def run(
    tiny: LoadedModel,
    texts: Sequence[Document],
    indexers: Path | None,
    verify: Sequence[Document] = (),
    **settings: Any,
) -> Calibration:
    settings = {"budgets": BUDGETS, "max_dense": 1, **settings}
    return calibrate(tiny, texts, CalibrationSettings(**settings), indexers=indexers, verify=verify)


def test_a_perplexity_target(tiny: LoadedModel, indexers: Path, texts: list[Document], tmp_path: Path) -> None:
    found = run(tiny, texts, indexers, perplexity_ratio=1.2, compare_uniform=True)
    assert found.ratio.ratio <= 1.2
    assert found.ratio.low <= found.ratio.ratio <= found.ratio.high
    assert config_of(tiny.model) == found.config
    assert [row.layer for row in found.layers] == [0, 1, 2, 3]
    assert sum(found.count(kind) for kind in ("sparse", "shared", "dense")) == 4
    assert found.count("dense") <= 1
    assert found.config.top_k == max(row.top_k or 0 for row in found.layers)
    assert len(indexers_of(tiny.model)) == found.count("sparse")
    assert found.probes
    for probe in found.probes:
        assert probe.predicted <= math.log(1.2) or len(found.probes) == 1
    assert found.cost.operations < found.dense_cost.operations
    for row in found.layers:
        assert row.effect is not None
        assert row.effect >= 0
        kind = {"sparse": found.config.has_indexer, "dense": found.config.is_dense}.get(row.kind)
        assert kind is None or kind(row.layer)
        assert row.share == found.config.shared_with(row.layer)
        assert row.top_k in (None, found.config.layer_top_k(row.layer))
        assert 0 <= row.kept <= 1 + 1e-9
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert dsa.DSAConfig.from_dict(plain["config"]) == found.config
    assert plain["uniform"] is not None

    file = save_indexers(tiny.model, tmp_path, trained=True)
    dsa.detach(tiny.model)
    assert attach(tiny.model, indexers=file).config == found.config


def test_the_ratio_is_what_the_evaluation_measures(
    tiny: LoadedModel, indexers: Path, texts: list[Document], tmp_path: Path
) -> None:
    found = run(tiny, texts[:1], indexers, perplexity_ratio=1.2)
    file = save_indexers(tiny.model, tmp_path, trained=True)
    dsa.detach(tiny.model)
    tokens = found.texts["a text"]
    result = evaluate(tiny, texts[0], tokens=tokens, new_tokens=0, indexers=file)
    assert found.ratio.ratio == pytest.approx(result.dsa.perplexity / result.dense.perplexity, rel=1e-4)
    shape_cost = model_cost(found.config, _shape(), range(4), tokens // 2 + 1, tokens)
    assert found.cost.operations == pytest.approx(shape_cost.operations)


def _shape() -> Any:
    from dsa.cost import AttentionShape

    return AttentionShape(4, 2, 8, 8, 2, 8)


def test_other_texts_judge(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    found = run(tiny, texts[:1], indexers, verify=texts[1:], perplexity_ratio=1.2)
    assert list(found.texts) == ["a text"]
    assert list(found.verified_on) == ["another text"]
    assert found.is_verified_elsewhere
    assert found.ratio.ratio != found.probes[-1].ratio


def test_a_mass_target(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    found = run(tiny, texts, indexers, mass=0.4)
    assert found.probes == ()
    for row in found.layers:
        assert row.effect is None
        assert row.kind == "dense" or row.kept >= 0.4
    loose = calibrate_again(tiny, texts, indexers, mass=0.2)
    assert loose.cost.operations < found.cost.operations


def calibrate_again(tiny: LoadedModel, texts: list[Document], indexers: Path, **settings: Any) -> Calibration:
    dsa.detach(tiny.model)
    return run(tiny, texts, indexers, **settings)


def test_sharing_can_be_asked_for_and_forbidden(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    most = run(tiny, texts, indexers, perplexity_ratio=3.0, min_shared=0.7, effects=False)
    assert most.count("shared") >= 3
    assert all(row.effect is None for row in most.layers)
    none = calibrate_again(tiny, texts, indexers, perplexity_ratio=3.0, may_share=False, effects=False)
    assert none.count("shared") == 0


def test_fewest_tokens(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    options = {"perplexity_ratio": 1.3, "effects": False, "max_dense": 0}
    tokens = run(tiny, texts, indexers, minimise="tokens", **options)
    assert tokens.count("shared") == 0
    other = calibrate_again(tiny, texts, indexers, minimise="operations", **options)
    assert tokens.cost.tokens_read <= other.cost.tokens_read
    some = calibrate_again(tiny, texts, indexers, minimise="tokens", min_shared=0.5, **options)
    assert some.count("shared") == 2


def test_layers_without_an_indexer_stay_dense(tiny: LoadedModel, texts: list[Document], tmp_path: Path) -> None:
    attach(
        tiny.model,
        indexers=None,
        top_k=16,
        local=2,
        sinks=1,
        layers={0: LayerConfig(dense=True), 2: LayerConfig(local=3)},
    )
    save_indexers(tiny.model, tmp_path, trained=True)
    dsa.detach(tiny.model)
    found = run(tiny, texts, tmp_path, perplexity_ratio=3.0)
    assert found.layers[0].kind == "dense"
    assert not found.layers[0].has_indexer
    if found.layers[2].kind == "sparse":
        assert found.config.layer_local(2) == 3
    with pytest.raises(ValueError, match=r"1 layers have no indexer and stay dense \(0\), more than max-dense=0"):
        calibrate_again(tiny, texts, tmp_path, perplexity_ratio=3.0, max_dense=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mass": 0.9999, "budgets": (4, 5)}, r"mass: 0.9999 is not reachable with K up to 5 .*nearest target"),
        ({"mass": 0.2, "min_shared": 0.99}, "min-shared: fewer than 4 of 4 layers"),
        ({"perplexity_ratio": 2.0, "min_shared": 0.99}, "min-shared: 4 of 4 layers cannot share"),
        ({"perplexity_ratio": 1.1, "budgets": (2, 8)}, "2 is below the 1 sinks and 2 local tokens"),
        ({"perplexity_ratio": 1.1, "budgets": (8, 171)}, "171 is not below the text's 171 tokens"),
        ({"perplexity_ratio": 1.1, "tokens": 1000}, "data: a text has only 243 tokens|has only 243 tokens"),
    ],
)
def test_what_cannot_be_reached(
    tiny: LoadedModel, indexers: Path, texts: list[Document], settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        run(tiny, texts, indexers, **settings)
    assert not is_attached(tiny.model)


def test_a_ratio_that_cannot_be_reached(
    tiny: LoadedModel, indexers: Path, texts: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model may read better sparse than dense, and which weights it has depends on the processor.
    monkeypatch.setattr(
        "dsa.calibrate.passes.Passes.losses_with",
        lambda passes, config, texts, what: [text.losses + math.log(1.01) for text in texts],
    )
    expected = r"not reachable with K up to 5 and at most 0 dense layers; the nearest came to 1\.0100"
    with pytest.raises(ValueError, match=expected):
        run(tiny, texts, indexers, perplexity_ratio=1.0000001, budgets=(4, 5), max_dense=0)
    assert not is_attached(tiny.model)


def test_what_there_is_nothing_to_calibrate_about(
    tiny: LoadedModel, indexers: Path, texts: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="untrained"):
        run(tiny, texts, None, perplexity_ratio=1.1)
    with pytest.raises(ValueError, match="no text was given"):
        run(tiny, [], indexers, perplexity_ratio=1.1)
    with pytest.raises(ValueError, match=r"data: short has 1 token\(s\)"):
        run(tiny, [Document("x", "short")], indexers, perplexity_ratio=1.1)
    with pytest.raises(ValueError, match="data: 6 tokens are too few"):
        run(tiny, [Document("six by", "short")], indexers, perplexity_ratio=1.1, budgets=None, max_dense=1)
    attach(tiny.model, indexers=indexers, layers={2: {"share": 1}})
    save_indexers(tiny.model, tmp_path, trained=True)
    dsa.detach(tiny.model)
    with pytest.raises(ValueError, match="calibrated already \\(layer 2 shares"):
        run(tiny, texts, tmp_path, perplexity_ratio=1.1)


def test_an_attached_model_survives_a_failure(
    tiny: LoadedModel, indexers: Path, texts: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = attach(tiny.model, indexers=indexers)
    weight = tiny.model.model.layers[1].self_attn.indexer.wk.weight.clone()

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsa.calibrate.passes.divergence", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, texts, None, perplexity_ratio=1.2)
    assert report_of(tiny.model).config == before.config
    assert torch.equal(tiny.model.model.layers[1].self_attn.indexer.wk.weight, weight)
    assert "forward" not in vars(tiny.model.model.layers[0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "either mass .* or perplexity-ratio .*, got neither"),
        ({"mass": 0.9, "perplexity_ratio": 1.1}, "got both"),
        ({"mass": 1.0}, "mass is the share"),
        ({"perplexity_ratio": 1.0}, "must be above 1, got 1.0"),
        ({"perplexity_ratio": float("nan")}, "must be above 1"),
        ({"mass": 0.9, "max_dense": -1}, "max-dense must be at least 0"),
        ({"mass": 0.9, "min_shared": 1.0}, "min-shared is a share of the layers"),
        ({"mass": 0.9, "min_shared": 0.5, "may_share": False}, "contradicts no-share"),
        ({"mass": 0.9, "minimise": "time"}, "minimise must be one of operations, bytes, tokens, got 'time'"),
        ({"mass": 0.9, "budgets": (0,)}, "top-k must be at least 1, got 0"),
    ],
)
def test_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CalibrationSettings(**settings)


def test_budgets_by_default() -> None:
    settings = CalibrationSettings(mass=0.9)
    assert resolve_budgets(settings, dsa.DSAConfig(), [0], 8192) == [
        320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048
    ]  # fmt: skip
    assert resolve_budgets(settings, dsa.DSAConfig(), [0], 2048) == [320, 384, 448, 512, 640, 768, 896, 1024]
    long = resolve_budgets(settings, dsa.DSAConfig(), [0], 131072)
    assert (len(long), long[0], long[-1]) == (16, 2560, 32768)
    with pytest.raises(ValueError, match="at least 1,040 are needed"):
        resolve_budgets(settings, dsa.DSAConfig(), [0], 500)
