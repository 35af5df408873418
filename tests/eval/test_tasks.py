"""The tasks: repeatable, in agreement with the comparison, and pointing at a layer that is broken."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dsa.cli.eval_table import show_tasks
from dsa.eval.agreement import agreement, choices, places_in
from dsa.eval.comparison import contexts
from dsa.eval.layers import suspect_layers
from dsa.eval.mass import MassObserver
from dsa.eval.plot import draw_tasks
from dsa.eval.tasks import NeedleOptions, parse_kinds, parse_lengths, parse_tasks, run_tasks
from dsa.models import attach, is_attached
from dsa.models.context import DSAContext
from dsa.models.loading import LoadedModel
from dsa.runs.inputs import Document
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer


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


def test_kinds_of_needles() -> None:
    assert parse_kinds("multi-key,single") == ["multi-key", "single"]
    assert parse_kinds("all") == ["single", "multi-key", "multi-value", "variable-tracking"]
    with pytest.raises(ValueError, match=r"needle-kinds: expected some of single, .*; did you mean multi-key\?"):
        parse_kinds("multikey")
    with pytest.raises(ValueError, match="got none"):
        parse_kinds(" ")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_choices_are_the_greedy_continuation_s(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(1, 50)
    attach(model, TINY_CONFIG.replace(index_dtype="fp32"))
    places = places_in(50, 25, 3)
    assert places == [25, 38, 50]
    for reader in ("dense", "dsa"):
        made = choices(model, ids, places, contexts(reader, TINY_CONFIG), 6)
        assert choices(model, ids, places, contexts(reader, TINY_CONFIG), 6, made) == made
        for place, continuation in zip(places, made, strict=True):
            whole = torch.cat((ids[:, :place], torch.tensor([continuation[:-1]])), dim=1)
            with torch.no_grad():
                logits = model(whole, dsa_context=contexts(reader, TINY_CONFIG)()).logits
            assert logits[0, place - 1 :].argmax(dim=-1).tolist() == continuation


def test_agreement_by_hand() -> None:
    found = agreement([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]])
    assert (found["top1"], found["until_divergence"], found["identical"]) == (0.875, 2.5, 0.5)


def test_needles_and_agreement() -> None:
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=4096)
    attach(model, TINY_CONFIG)
    text = Document("It was a quiet day, and nothing much went on. Nobody minded that! " * 40, "a text")
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny", False)
    options = {"tokens": 60, "needles": NeedleOptions([1600])}
    runs = [run_tasks(loaded, [text], ["needles", "agreement"], **options) for _ in range(2)]  # type: ignore[arg-type]
    assert [row["reader"] for row in runs[0]["needles"]] == ["dsa", "window", "pattern", "blocks", "oracle", "random"]
    assert runs[0]["agreement"]["dsa"]["continuations"] == 8
    assert runs[0]["needles"] == runs[1]["needles"]
    assert runs[0]["agreement"] == runs[1]["agreement"]
    with pytest.raises(ValueError, match="length must leave room"):
        run_tasks(loaded, [text], ["needles"], tokens=60, needles=NeedleOptions([100]))


def test_every_kind_of_needle_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dsa.eval.tasks.HAYSTACKS", 1)
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=4096)
    attach(model, TINY_CONFIG)
    text = Document("It was a quiet day, and nothing much went on. Nobody minded that! " * 40, "a text")
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny", False)
    kinds = ["multi-key", "multi-value", "variable-tracking"]
    found = run_tasks(loaded, [text], ["needles"], tokens=60, needles=NeedleOptions([3000], kinds))
    rows = [row for row in found["needles"] if row["reader"] == "dsa"]
    assert [(row["kind"], row["length"]) for row in rows] == [(kind, 3000) for kind in kinds]
    assert [row["cells"][-1]["asked"] for row in rows] == [10, 30, 30]
    assert [cell["depth"] for cell in rows[0]["cells"]] == [*range(10), None]
    assert all(cell["log_probability"] < 0 for row in rows for cell in row["cells"])
    file = tmp_path / "figures.svg"
    draw_tasks(found, file)
    assert "<svg" in file.read_text()
    console = Console(file=io.StringIO(), width=80)
    show_tasks(found, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "variable-tracking" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_it_is_drawn(tiny: LoadedModel, document: Document, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    attach(tiny.model, TINY_CONFIG)
    file = tmp_path / "figures.svg"
    draw_tasks(run_tasks(tiny, [document], ["perplexity", "mass", "agreement"], tokens=80), file)
    assert "<svg" in file.read_text()


def test_lengths() -> None:
    assert parse_lengths("2048, 4096") == [2048, 4096]
    with pytest.raises(ValueError, match="expected whole numbers"):
        parse_lengths("2k")
