"""One layer's trainer on a hand-made call: which queries, which gradients, which state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa import AttentionCall, DSAConfig
from dsa.modules.indexer import Indexer, Rope
from dsa.ops import indexer_loss
from dsa.train import WarmupSettings
from dsa.train.layer import LayerTrainer, draw_queries, index_some

TOKENS, HIDDEN = 21, 12
CONFIG = DSAConfig(top_k=8, index_heads=2, index_head_dim=8, sinks=1, local=2)
SETTINGS = WarmupSettings(steps=5, seq_len=TOKENS, queries_per_update=6).resolved(CONFIG, [3])


def rope_angles(pairs: int = 4) -> Rope:
    angles = torch.arange(TOKENS)[:, None] / torch.logspace(0, 2, pairs)
    return angles.cos()[None], angles.sin()[None]


def make_call(rope: Rope | None) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ends = torch.arange(1, TOKENS + 1, dtype=torch.int32)[None]
    return AttentionCall(
        layer=3,
        query=random(1, TOKENS, 4, 6),
        key=random(1, TOKENS, 2, 6),
        value=random(1, TOKENS, 2, 6),
        hidden_states=random(1, TOKENS, HIDDEN),
        rope=rope,
        index_query=None,
        index_key=None,
        index_weight=None,
        indices=None,
        key_start=torch.zeros_like(ends),
        key_end=ends,
        scale=0.7,
        softcap=5.0,
        sink_logits=random(4),
    )


def make_trainer(indexer: Indexer) -> LayerTrainer:
    return LayerTrainer(3, indexer, CONFIG, SETTINGS)


@pytest.fixture
def indexer() -> Indexer:
    torch.manual_seed(1)
    return Indexer(HIDDEN, CONFIG)


@given(tokens=st.integers(4, 60), first=st.integers(0, 3), per_update=st.integers(1, 60), updates=st.integers(1, 9))
def test_draws_are_ascending_without_repetition_and_use_all(
    tokens: int, first: int, per_update: int, updates: int
) -> None:
    per_update = min(per_update, tokens - first)
    eligible = torch.arange(first, tokens)
    rows = draw_queries(eligible, per_update, updates, torch.Generator().manual_seed(0))
    assert rows.shape == (updates, per_update)
    assert (rows.diff(dim=1) > 0).all()
    assert first <= int(rows.min()) <= int(rows.max()) < tokens
    one_round = rows[: (tokens - first) // per_update].flatten()
    assert one_round.unique().numel() == one_round.numel()


@pytest.mark.parametrize("rope", [None, rope_angles(), rope_angles(2)])
def test_index_of_some_rows_is_that_of_the_whole_forward(indexer: Indexer, rope: Rope | None) -> None:
    call = make_call(rope)
    rows = torch.tensor([0, 5, 20])
    whole = indexer(call.hidden_states, rope)
    some = index_some(indexer, call.hidden_states, rope, rows[None])
    assert torch.allclose(some.query, whole.query[:, rows], atol=1e-6)
    assert torch.allclose(some.key, whole.key, atol=1e-6)
    assert torch.allclose(some.weight, whole.weight[:, rows], atol=1e-6)


@pytest.mark.parametrize("rope", [None, rope_angles()])
def test_first_update_is_a_clipped_adamw_step_on_the_loss_of_those_rows(indexer: Indexer, rope: Rope | None) -> None:
    call = make_call(rope)
    rows = torch.tensor([4, 7, 9, 13, 19, 20])
    by_hand = copy.deepcopy(indexer)
    whole = by_hand(call.hidden_states, rope)
    loss = indexer_loss(
        whole.query,
        whole.key,
        whole.weight,
        call.query,
        call.key,
        attention_scale=call.scale,
        query_mask=torch.isin(torch.arange(TOKENS), rows)[None],
        sinks=1,
        local=2,
        softcap=5.0,
        sink_logits=call.sink_logits,
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    lr = SETTINGS.lr_at(2.5)
    torch.optim.AdamW(by_hand.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0).step()

    trainer = make_trainer(indexer)
    with torch.no_grad():
        got = trainer.train(call, rows[None, None], step=2)
    assert got[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in by_hand.named_parameters():
        assert torch.allclose(trainer.parameters[name], parameter, atol=1e-3 * lr), name


def test_the_models_indexer_changes_only_when_written_back(indexer: Indexer) -> None:
    narrow = copy.deepcopy(indexer).to(torch.bfloat16)
    before = copy.deepcopy(narrow.state_dict())
    trainer = make_trainer(narrow)
    rows = torch.arange(4, 20).view(2, 1, 8)
    trainer.train(make_call(rope_angles()), rows, step=0)
    assert all(torch.equal(before[name], value) for name, value in narrow.state_dict().items())
    trainer.write_back()
    for name, value in narrow.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, trainer.parameters[name].to(torch.bfloat16))
    assert not torch.equal(before["wq.weight"], narrow.wq.weight)


def test_state_makes_another_trainer_continue_the_same(indexer: Indexer) -> None:
    call = make_call(rope_angles())
    rows = torch.arange(4, 20).view(2, 1, 8)
    first, second = make_trainer(indexer), make_trainer(Indexer(HIDDEN, CONFIG))
    first.train(call, rows, step=0)
    second.load_state(first.state())
    assert torch.equal(first.train(call, rows, step=1), second.train(call, rows, step=1))
    for name in first.parameters:
        assert torch.equal(first.parameters[name], second.parameters[name])


def test_state_that_does_not_fit_is_refused(indexer: Indexer) -> None:
    trainer = make_trainer(indexer)
    trainer.train(make_call(None), torch.arange(4, 20).view(2, 1, 8), step=0)
    state = trainer.state()
    with pytest.raises(ValueError, match="layer 3: expected the tensors"):
        trainer.load_state({name: value for name, value in state.items() if name != "exp_avg.wk.weight"})
    state["weight.wk.weight"] = state["weight.wk.weight"][:2]
    with pytest.raises(ValueError, match=r"layer 3: wk\.weight must be"):
        trainer.load_state(state)
