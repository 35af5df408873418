"""The pass that measures selections, against the evaluation's figures and against selecting anew."""

from pathlib import Path

import pytest
import torch

from dsa import DSAContext
from dsa.calibrate import measure
from dsa.calibrate.measure import Curves, SelectionObserver, rank, sampled_positions
from dsa.eval.mass import measure_layer
from dsa.models import AttentionCall, attach
from dsa.models.loading import LoadedModel
from dsa.ops import index_topk
from dsa.runs.inputs import Document, encode

BUDGETS = [4, 9, 16, 40]


def dense_calls(tiny: LoadedModel, indexers: Path, ids: torch.Tensor) -> tuple[list[AttentionCall], object]:
    calls: list[AttentionCall] = []
    config = attach(tiny.model, indexers=indexers).config
    with torch.no_grad():
        tiny.model(ids, use_cache=False, dsa_context=DSAContext(mode="dense", observer=calls.append))
    return calls, config


def observed(calls: list[AttentionCall], config: object, starts: list[int]) -> Curves:
    curves = Curves.empty([call.layer for call in calls], BUDGETS)
    for start in starts:
        tokens = calls[0].query.shape[1]
        observer = SelectionObserver(curves, config, sampled_positions(start, tokens))  # type: ignore[arg-type]
        for call in calls:
            observer(call)
        observer.finish()
    return curves


def test_the_evaluation_measures_the_same(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    calls, config = dense_calls(tiny, indexers, encode(texts[0], tiny.tokenizer))
    curves = observed(calls, config, [10])
    for number, top_k in enumerate(BUDGETS):
        for row, call in enumerate(calls):
            expected = measure_layer(call, config.replace(top_k=top_k), 10)  # type: ignore[attr-defined]
            assert curves.kept[row, row, number] == pytest.approx(expected.dsa, abs=1e-6)
            assert curves.oracle[row, number] == pytest.approx(expected.oracle, abs=1e-6)
    assert torch.equal(curves.own(2), curves.kept[2, 2])
    shape = curves.shape
    assert shape is not None
    assert (shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim) == (4, 2, 8, 8)
    assert (shape.index_heads, shape.index_head_dim, shape.kv_bytes, shape.index_bytes) == (2, 8, 4, 1)


def test_another_layers_selection(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    calls, config = dense_calls(tiny, indexers, encode(texts[0], tiny.tokenizer))
    curves = observed(calls, config, [30])
    rows = sampled_positions(30, calls[0].query.shape[1])
    source, reader = calls[1], calls[3]
    attention = measure.attention_of(reader, rows)
    assert attention.sum(dim=1) == pytest.approx(torch.ones(len(rows)), abs=1e-5)
    for number, top_k in enumerate(BUDGETS):
        indices = index_topk(
            source.index_query[:, rows], source.index_key, source.index_weight[:, rows], top_k, sinks=1, local=2,
            key_start=source.key_start[:, rows], key_end=source.key_end[:, rows],
        )[0]  # fmt: skip
        kept = torch.stack([attention[row, chosen[chosen >= 0].long()].sum() for row, chosen in enumerate(indices)])
        assert curves.kept[3, 1, number] == pytest.approx(float(kept.mean()), abs=1e-6)
        assert curves.harm[3, 1, number] == pytest.approx(float((1 - kept).pow(2).mean()), abs=1e-6)
    assert curves.kept[1, 3].isnan().all()


def test_rankings_are_nested_and_padded(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    calls, config = dense_calls(tiny, indexers, encode(texts[0], tiny.tokenizer))
    rows = torch.tensor([0, 2, 11, 100])
    ranking = rank(calls[0], config, rows, BUDGETS)  # type: ignore[arg-type]
    for row, seen in zip(ranking, (1, 3, 12, 101)):
        valid = min(seen, BUDGETS[-1])
        assert (row[:valid] >= 0).all()
        assert (row[valid:] == -1).all()
        assert len(set(row[:valid].tolist())) == valid


def test_two_texts_are_averaged_over_their_queries(tiny: LoadedModel, indexers: Path, texts: list[Document]) -> None:
    calls, config = dense_calls(tiny, indexers, encode(texts[0], tiny.tokenizer))
    first, second, both = (observed(calls, config, starts) for starts in ([10], [200], [10, 200]))
    assert both.queries == first.queries + second.queries
    expected = (first.kept * first.queries + second.kept * second.queries) / both.queries
    torch.testing.assert_close(both.kept, expected, equal_nan=True)


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled_positions(5, 10).tolist() == [5, 6, 7, 8, 9]
    assert len(sampled_positions(4096, 8192)) == measure.QUERIES
    monkeypatch.setattr(measure, "ATTENTION_AT_ONCE", 1000)
    assert sampled_positions(50, 100).tolist()[-1] == 99
    assert len(sampled_positions(50, 100)) == 10
