"""Settings: what makes no sense is refused, and the schedule is the one described."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsa import DSAConfig, LayerConfig
from dsa.train import WarmupSettings

CONFIG = DSAConfig(top_k=64, sinks=4, local=16, layers={1: LayerConfig(local=32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"seq_len": 1}, "seq_len must be a whole number of at least 2"),
        ({"seed": -1}, "seed must be"),
        ({"queries_per_update": 0}, "queries_per_update must be"),
        ({"updates_per_sequence": 0}, "updates_per_sequence must be"),
        ({"lr": 0.0}, "lr must lie between 0 and 1, got 0.0"),
        ({"lr": -1e-3}, "lr must lie between"),
        ({"lr": float("nan")}, "lr must lie between"),
        ({"lr": 3.0}, "lr must lie between"),
        ({"warmup_steps": 10}, "warmup_steps must be less than steps .10., got 10"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"schedule": "linear"}, "schedule must be one of cosine, wsd, constant, got 'linear'"),
        ({"decay_steps": 3}, "decay_steps=3 has no meaning with schedule=cosine; use schedule=wsd"),
        ({"schedule": "wsd", "decay_steps": 0}, "decay_steps must be a whole number of at least 1"),
        (
            {"schedule": "wsd", "decay_steps": 8, "warmup_steps": 3},
            r"warmup_steps .3. and decay_steps .8. are more than the 10 steps",
        ),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
        ({"sequences": 0}, "sequences must be a whole number of at least 1"),
        ({"target": "near"}, "target must be one of far, paper, got 'near'"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupSettings(**{"steps": 10, "seq_len": 128, **changes})


def test_defaults_use_every_query_about_once() -> None:
    settings = WarmupSettings(steps=200, seq_len=4096).resolved(DSAConfig(), [1, 2])
    assert (settings.queries_per_update, settings.updates_per_sequence, settings.warmup_steps) == (64, 60, 4)
    short = WarmupSettings(steps=1, seq_len=100).resolved(CONFIG, [0, 1])
    assert (short.queries_per_update, short.updates_per_sequence, short.warmup_steps) == (100 - 37, 1, 0)


def test_sequences_too_short_to_learn_from() -> None:
    settings = WarmupSettings(steps=1, seq_len=37)
    settings.resolved(CONFIG, [0])
    with pytest.raises(ValueError, match=r"seq_len=37 leaves layer 1 nothing to learn: with 4 sinks .* window of 32"):
        settings.resolved(CONFIG, [0, 1])
    dataclasses.replace(settings, target="paper").resolved(CONFIG, [0, 1])
    with pytest.raises(ValueError, match="queries_per_update=17 is more than the 16 queries"):
        dataclasses.replace(settings, queries_per_update=17).resolved(CONFIG, [0])


def test_schedule_rises_to_the_peak_and_falls_to_zero() -> None:
    settings = WarmupSettings(steps=110, seq_len=128, lr=0.01, warmup_steps=10).resolved(CONFIG, [0])
    assert settings.lr_at(0) == 0
    assert settings.lr_at(5) == pytest.approx(0.005)
    assert settings.lr_at(10) == pytest.approx(0.01)
    assert settings.lr_at(60) == pytest.approx(0.005)
    assert settings.lr_at(110) == pytest.approx(0)
    assert WarmupSettings(steps=4, seq_len=128, warmup_steps=0).resolved(CONFIG, [0]).lr_at(0) == pytest.approx(1e-2)


def test_wsd_stays_and_falls_at_the_end() -> None:
    settings = WarmupSettings(steps=100, seq_len=128, lr=0.01, warmup_steps=10, schedule="wsd").resolved(CONFIG, [0])
    assert settings.decay_steps == 20
    assert settings.lr_at(5) == pytest.approx(0.005)
    assert settings.lr_at(10) == settings.lr_at(80) == 0.01
    assert settings.lr_at(90) == pytest.approx(0.005)
    assert settings.lr_at(100) == 0
    constant = dataclasses.replace(settings, schedule="constant", decay_steps=None)
    assert constant.lr_at(99.5) == 0.01
