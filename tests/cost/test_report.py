"""What `dsa cost` shows of a model: which DSA is counted, what is compared, and the lengths drawn."""

import json
from pathlib import Path

import pytest

from dsa import DSAConfig, LayerConfig
from dsa.cli.cost import saved_config
from dsa.cost import config_for, decode_work, model_report, read_model, total
from dsa.cost.plot import draw_costs, lengths_for
from dsa.cost.report import variants_of

SHAPE, SHIPPED = read_model("default", saved_config)


def test_whose_dsa_is_counted() -> None:
    assert config_for(SHAPE, None).top_k == 2048
    own = config_for(SHAPE, SHIPPED, index_heads=8)
    assert SHIPPED is not None
    assert (own.top_k, own.index_heads, own.is_dense(0)) == (SHIPPED.top_k, 8, True)
    # The default's 260 always-read tokens cost nothing of their own and are no lower bound.
    assert config_for(SHAPE, SHIPPED, top_k=64).top_k == 64


def test_shared_selections() -> None:
    config = config_for(SHAPE, SHIPPED, share=4)
    assert [config.shared_with(layer) for layer in range(7)] == [None, None, 1, 1, 1, None, 5]
    assert [config.has_indexer(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert config_for(SHAPE, SHIPPED, share=1).layers == {0: LayerConfig(dense=True)}
    with pytest.raises(ValueError, match="share must be at least 1, got 0"):
        config_for(SHAPE, None, share=0)


def test_what_is_compared() -> None:
    assert list(variants_of(DSAConfig())) == ["dense", "dsa"]
    mixed = DSAConfig(layers={1: LayerConfig(top_k=300), 2: LayerConfig(share=1), 5: LayerConfig(dense=True)})
    variants = variants_of(mixed)
    assert list(variants) == ["dense", "dsa", "shared"]
    alone = variants["dsa"]
    assert alone is not None
    assert (alone.has_indexer(2), alone.layer_top_k(2), alone.is_dense(5)) == (True, 300, True)
    assert variants["shared"] is mixed


def test_a_report_is_plain_json_and_adds_up() -> None:
    config = config_for(SHAPE, SHIPPED, share=2)
    report = model_report(SHAPE, config, 5000, 10)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["attention_pairs_dense"] == 25_000_000
    for name, each in report["variants"].items():
        for phase in ("token", "prompt", "request"):
            parts = dict(each[phase])
            whole = parts.pop("total")
            assert whole["bytes"] == pytest.approx(sum(part["bytes"] for part in parts.values())), name
    point = report["crossing"]["shared"]["token_multiply_adds"]
    costs = [[total(decode_work(SHAPE, c, n, n)).multiply_adds for c in (None, config)] for n in (point - 1, point)]
    assert costs[0][0] <= costs[0][1]
    assert costs[1][0] > costs[1][1]


def test_lengths_drawn() -> None:
    assert lengths_for(1) == [1]
    lengths = lengths_for(131072)
    assert (lengths[0], lengths[-1]) == (1024, 131072)
    assert len(lengths) == 29


@pytest.mark.parametrize("tokens", [1, 3000])
def test_a_drawing(tokens: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_costs(SHAPE, config_for(SHAPE, SHIPPED, share=3), tokens, tmp_path / "cost.svg")
    assert "</svg>" in (tmp_path / "cost.svg").read_text()
