"""The tasks: repeatable, in agreement with the comparison, and pointing at a layer that is broken."""

import pytest

from dsa.eval.documents import Document
from dsa.eval.layers import suspect_layers
from dsa.eval.mass import MassObserver
from dsa.eval.tasks import parse_tasks, run_tasks
from dsa.models import attach, is_attached
from dsa.models.context import DSAContext
from dsa.models.loading import LoadedModel
from dsa.testing.tiny_models import TINY_CONFIG


def test_the_same_seed_gives_the_same_figures(tiny: LoadedModel, document: Document) -> None:
    attach(tiny.model, TINY_CONFIG)
    runs = [run_tasks(tiny, [document, document], ["perplexity", "mass"], tokens=80, top_k=12) for _ in range(2)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1]
    assert is_attached(tiny.model)
    assert runs[0]["perplexity"]["dense"]["ratio"] == 1
    assert set(runs[0]["mass"]["recall"]) == {"dsa", "window", "pattern", "blocks", "random"}
    assert all(len(row["mass_by_position"]["dsa"]) == 8 for row in runs[0]["mass"]["layers"])


def test_the_mass_is_the_comparison_s(tiny: LoadedModel, document: Document) -> None:
    attach(tiny.model, TINY_CONFIG)
    found = run_tasks(tiny, [document], ["mass"], tokens=80)["mass"]["layers"]
    observer = MassObserver(TINY_CONFIG, 40)
    ids = tiny.tokenizer(document.text, return_tensors="pt")["input_ids"][:, :80]
    tiny.model(ids, use_cache=False, dsa_context=DSAContext(mode="dense", observer=observer))
    for row, own in zip(found, observer.layers, strict=True):
        assert row["mass"]["dsa"] == pytest.approx(own.dsa, abs=1e-5)
        assert row["mass"]["window"] == pytest.approx(own.window, abs=1e-5)
        assert row["mass"]["oracle"] == pytest.approx(own.oracle, abs=1e-5)
        assert row["recall"]["dsa"] == pytest.approx(own.recall, abs=1e-5)


def layers(*shares: float) -> list[dict[str, object]]:
    return [{"layer": number, "mass": {"dsa": share, "oracle": 1.0}} for number, share in enumerate(shares)]


def test_a_layer_that_stands_out() -> None:
    (found,) = suspect_layers(layers(0.99, 0.97, 0.98, 0.6, 0.96, 0.99))
    assert (found["layer"], found["share"]) == (3, 0.6)
    assert suspect_layers(layers(0.99, 0.97, 0.98, 0.95)) == []
    assert suspect_layers(layers(0.99, 0.2)) == []


def test_a_model_without_indexers(tiny: LoadedModel, document: Document) -> None:
    with pytest.raises(ValueError, match=r"tiny has no indexers.*dsa train tiny"):
        run_tasks(tiny, [document], ["mass"], tokens=80)
    assert not is_attached(tiny.model)


def test_names_of_tasks() -> None:
    assert parse_tasks("mass, perplexity,mass") == ["mass", "perplexity"]
    with pytest.raises(ValueError, match="got 'perplexty'; did you mean perplexity"):
        parse_tasks("perplexty")
    with pytest.raises(ValueError, match="runs alone"):
        parse_tasks("comparison,mass")
