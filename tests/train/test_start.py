"""The fitted start: what it sets an indexer to, and how a run begins with it."""

from pathlib import Path

import pytest
import torch

import dsa
from dsa.models import config_of, indexers_of
from dsa.models.context import AttentionCall, DSAContext
from dsa.ops import indexer_loss
from dsa.testing.training import CONFIG, attached, random_tokens, read_log
from dsa.train import RunOptions, WarmupSettings, train_indexers
from dsa.train.start import fit_indexer

TOKENS = 160
ROWS = torch.arange(40, TOKENS)


def calls_of(model: torch.nn.Module) -> dict[int, AttentionCall]:
    """What every layer with an indexer computes for one sequence."""
    calls: dict[int, AttentionCall] = {}
    ids = random_tokens().ids[:TOKENS].long()[None]
    context = DSAContext(mode="dense", observer=lambda call: calls.__setitem__(call.layer, call))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, dsa_context=context)
    return calls


def loss_of(model: torch.nn.Module, call: AttentionCall) -> float:
    config = config_of(model)
    indexer = indexers_of(model)[call.layer]
    with torch.no_grad():
        index = indexer(call.hidden_states, call.rope)
        loss = indexer_loss(
            index.query[:, ROWS],
            index.key,
            index.weight[:, ROWS],
            call.query[:, ROWS],
            call.key,
            attention_scale=call.scale,
            key_start=call.key_start[:, ROWS],
            key_end=call.key_end[:, ROWS],
            sinks=config.sinks,
            local=config.layer_local(call.layer),
            softcap=call.softcap,
            sink_logits=call.sink_logits,
        )
    return float(loss)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_it_is_nearer_than_random_weights(model_type: str) -> None:
    """With RoPE and without, with a softcap, with sink logits."""
    model = attached(model_type)
    config = config_of(model)
    for layer, call in calls_of(model).items():
        before = loss_of(model, call)
        fit_indexer(indexers_of(model)[layer], call, ROWS, config.sinks, config.layer_local(layer))
        assert loss_of(model, call) < before


def test_planted_attention_is_found() -> None:
    """A layer that attends by one direction of the hidden states, at any distance, is learnt from one sequence."""
    model = attached(
        config=dsa.DSAConfig(top_k=16, index_heads=4, index_head_dim=32, index_rope_dim=8, sinks=1, local=4)
    )
    layer, call = next(iter(calls_of(model).items()))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(call.hidden_states.shape, generator=generator) + 1
    seek, offer = torch.randn(2, hidden.shape[-1], generator=generator)
    query, key = torch.zeros_like(call.query), torch.zeros_like(call.key)
    query[..., 0] = (hidden @ seek)[..., None] / 4
    key[..., 0] = (hidden @ offer)[..., None] / 4
    planted = AttentionCall(**{**vars(call), "hidden_states": hidden, "query": query, "key": key, "scale": 1.0})
    before = loss_of(model, planted)
    fit_indexer(indexers_of(model)[layer], planted, ROWS, 1, 4)
    assert loss_of(model, planted) < 0.5 * before


def test_a_run_begins_with_it_and_resumes_exactly(tmp_path: Path) -> None:
    logs = {}
    for start in ("random", "fitted"):
        settings = WarmupSettings(steps=3, seq_len=64, queries_per_update=16, start=start)
        train_indexers(attached(), random_tokens(), tmp_path / start, settings)
        logs[start] = read_log(tmp_path / start)
    assert sum(logs["fitted"][0]["kl"].values()) < sum(logs["random"][0]["kl"].values())
    stopped = tmp_path / "stopped"
    train_indexers(attached(), random_tokens(), stopped, settings, RunOptions(should_stop=lambda: True))
    train_indexers(attached(), random_tokens(), stopped, settings, RunOptions(resume=True))
    assert read_log(stopped) == logs["fitted"]


def test_too_small_indexers_are_refused() -> None:
    settings = WarmupSettings(steps=3, seq_len=64, start="fitted")
    small = CONFIG.replace(index_heads=1)
    with pytest.raises(ValueError, match="at least 2 index heads"):
        settings.resolved(small, [0])
    with pytest.raises(ValueError, match="start must be one of"):
        WarmupSettings(steps=3, seq_len=64, start="fited")  # type: ignore[arg-type]
