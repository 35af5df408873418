"""What is recorded is what was selected: counts, exact rows, weights, passages."""

import pytest
import torch

from dsa.documents import SourceDocument
from dsa.generation.passages import cut
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.loading import LoadedModel
from dsa.report.explaining import explain
from dsa.report.explanation import Explanation
from dsa.report.packing import rate_level, varints, visible, weight_level
from dsa.report.passages import most_read, shares
from dsa.report.recording import Row


@pytest.fixture
def calls(loaded: LoadedModel, explanation: Explanation) -> dict[int, AttentionCall]:
    """The prompt read once more, in one pass, every layer's call kept."""
    seen: dict[int, AttentionCall] = {}
    context = DSAContext(observer=lambda call: seen.update({call.layer: call}), every_layer=True)
    with torch.no_grad():
        loaded.model(torch.tensor([explanation.prompt.ids]), use_cache=False, dsa_context=context)
    return seen


def test_counts_are_those_of_the_selections(explanation: Explanation, calls: dict[int, AttentionCall]) -> None:
    tokens = len(explanation.prompt.ids)
    for layer in (1, 2, 3):
        indices = calls[layer].indices
        assert indices is not None
        expected = torch.zeros(tokens, dtype=torch.int32)
        for query in range(24, tokens):
            for key in indices[0, query].tolist():
                if key >= 2 and key < query + 1 - 6:
                    expected[key] += 1
        assert torch.equal(explanation.recorder.counts[layer].selected, expected)
        assert float(explanation.recorder.rates(layer).max()) <= 1
    assert explanation.recorder.counts[0].top_k is None


def test_rows_hold_the_attention_over_the_selection(explanation: Explanation, calls: dict[int, AttentionCall]) -> None:
    query = len(explanation.prompt.ids) - 1
    assert sorted(explanation.recorder.rows[query]) == [0, 1, 2, 3]
    for layer, row in explanation.recorder.rows[query].items():
        call = calls[layer]
        positions = range(query + 1) if call.indices is None else [i for i in call.indices[0, query].tolist() if i >= 0]
        assert row.positions.tolist() == list(positions)
        assert float(row.weights.sum()) == pytest.approx(1, abs=1e-5)
        head = torch.stack(
            [
                (call.key[0, list(positions), head // 2] @ call.query[0, query, head] * call.scale).softmax(dim=0)
                for head in range(4)
            ]
        )
        assert torch.allclose(row.weights, head.mean(dim=0), atol=1e-5)
        assert 0 < row.kept <= 1 + 1e-5


def test_each_token_of_the_answer_has_its_rows(explanation: Explanation) -> None:
    assert len(explanation.answer) == 6
    for number in range(6):
        rows = explanation.recorder.rows[explanation.query_of(number)]
        assert all(int(row.positions.max()) == explanation.query_of(number) for row in rows.values())


def test_tokens_are_the_text_and_know_their_page(explanation: Explanation) -> None:
    prompt = explanation.prompt
    assert "Question: What <i>is</i> it, \x1b\u202e</script>?\nAnswer:" in "".join(prompt.texts)
    inside = [page for page, part in zip(prompt.pages, prompt.parts, strict=True) if part == "document"]
    assert sorted(set(inside)) == [1, 2, 3]
    assert inside == sorted(inside)
    assert {page for page, part in zip(prompt.pages, prompt.parts, strict=True) if part == "question"} == {None}


def test_passages_cover_everything_and_cross_no_page() -> None:
    passages = cut(["word "] * 200, [1] * 90 + [2] * 110, ["document"] * 150 + ["question"] * 50)
    assert [(each.start, each.end) for each in passages] == [(0, 64), (64, 90), (90, 150), (150, 200)]
    assert [(each.page, each.part) for each in passages][1:3] == [(1, "document"), (2, "document")]


def test_what_every_token_reads_ranks_last() -> None:
    everyone = torch.tensor([[0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.5, 0.1, 0.0]])
    assert [each.passage for each in most_read(everyone[2], everyone.median(dim=0).values, 3)] == [1, 0]


def test_shares_leave_out_what_is_always_read() -> None:
    rows = {
        layer: Row(torch.tensor([0, 3, 5, 9], dtype=torch.int32), torch.tensor([0.1, 0.2, 0.3, 0.4]), 4, 1, 1, 0, 0)
        for layer in range(3)
    }
    passage_of = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    # Layer 2 reads everything; layer 1's window reaches back to 5.
    found = shares(rows, 9, passage_of, 2, {0: 2, 1: 5})
    assert torch.allclose(found, torch.tensor([0.2, 0.15, 0.0]))


def test_the_answer_ends_before_its_end_token(loaded: LoadedModel, explanation: Explanation) -> None:
    with torch.no_grad():
        first = loaded.model(torch.tensor([explanation.prompt.ids])).logits[0, -1].argmax()
    loaded.model.generation_config.eos_token_id = int(first)
    try:
        ended = explain(loaded, SourceDocument("text", "text.txt"), explanation.prompt, new_tokens=6)
    finally:
        loaded.model.generation_config.eos_token_id = None
    assert [each.is_end for each in ended.answer] == [True]
    assert ended.answer_text == ended.to_json()["answer"] == ""


def test_json_names_pages(explanation: Explanation) -> None:
    plain = explanation.to_json()
    assert {each["page"] for token in plain["tokens"] for each in token["passages"]} & {1, 2, 3}
    assert 0 < plain["mass_kept"] <= 1
    assert plain["dense"]["is_estimated"]
    assert plain["dsa"]["read"] < plain["dense"]["read"]


def test_levels_and_numbers() -> None:
    assert varints(torch.tensor([0, 127, 128, 300, 1 << 21])) == b"\x00\x7f\x80\x01\xac\x02\x80\x80\x80\x01"
    assert rate_level(torch.tensor([0.0, 1e-9, 0.5, 1.0])).tolist() == [0, 1, 14, 15]
    weights = torch.tensor([1.0, 0.01, 1e-8])
    back = 2 ** ((weight_level(weights).float() - 160) / 8)
    assert torch.allclose(back[:2], weights[:2], rtol=0.05)
    assert int(weight_level(weights)[2]) == 0


def test_steering_characters_are_seen_one_for_one() -> None:
    assert visible("a\x00\x1b\u202e\n\tb") == "a\u2400\u241b\u2421\n\tb"
