"""Which RoPE scaling a long text gets when a user names none, one, or `off`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import dsa
from dsa.models.extension import Demand, chosen_scaling, smallest_scaling
from dsa.models.loading import load_model
from dsa.models.rope import parse_scaling, scaling_of
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

POSITIONS = 64


def saved(folder: Path, family: str = "llama", **changes: Any) -> str:
    tiny_model(family, vocab_size=BYTE_VOCABULARY, max_position_embeddings=POSITIONS, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def choose(model: str, total: int, asked: str | None = None, indexers: str | None = None) -> Any:
    """The loaded model's configuration."""

    def demand(tokenizer: Any) -> Demand:
        assert tokenizer("ab")["input_ids"]
        return Demand(total - 7, 3, 4)

    return load_model(model, device="cpu", rope_scaling=chosen_scaling("it", asked, indexers, demand)).model.config


@pytest.mark.parametrize(
    ("needed", "factor"), [(65, 1.25), (80, 1.25), (81, 1.5), (96, 1.5), (128, 2.0), (129, 2.25), (1000, 15.75)]
)
def test_the_smallest_factor_with_room(needed: int, factor: float) -> None:
    assert smallest_scaling(needed, POSITIONS) == {"rope_type": "yarn", "factor": factor}
    assert needed <= factor * POSITIONS


def test_a_text_that_fits_changes_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in (None, "off"):
            assert scaling_of(choose(saved(tmp_path), POSITIONS, asked)) is None


def test_a_longer_text_is_stretched_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1\.4 times longer than it .*its first 57 tokens fit \(--tokens 57\)"):
        config = choose(saved(tmp_path), 91)
    assert config.max_position_embeddings == 96
    assert scaling_of(config)["factor"] == 1.5


def test_off_refuses_and_says_what_fits(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rope-scaling is off and it has 64 positions.* 57 tokens of it fit.*--tokens"
    ):
        choose(saved(tmp_path), 91, "off")


def test_an_explicit_scaling_wins(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = choose(saved(tmp_path), 91, "linear:4")
    assert scaling_of(config) == {"rope_type": "linear", "factor": 4.0}
    with pytest.warns(
        UserWarning, match=r"it has 128 positions with RoPE scaling linear:2: those from 128 on are extra"
    ):
        choose(str(tmp_path), 129, "linear:2")


def test_the_indexers_scaling_comes_before_a_chosen_one(tmp_path: Path) -> None:
    name, file = saved(tmp_path), tmp_path / "own.safetensors"
    model = load_model(name, device="cpu", rope_scaling=parse_scaling("yarn:4")).model
    dsa.attach(model, top_k=8, local=2, index_heads=2, index_head_dim=8)
    dsa.save_indexers(model, file)
    assert choose(name, 91, indexers=str(file)).max_position_embeddings == 4 * POSITIONS


def test_a_model_that_cannot_be_stretched_is_extrapolated(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", vocab_size=BYTE_VOCABULARY, max_position_embeddings=POSITIONS)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="those from 64 on are extrapolated"):
        assert choose(str(tmp_path), 91).max_position_embeddings == POSITIONS
