"""The fuzzer finds nothing in the operations, finds what is put into them, and repeats what it found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa.ops.quantize.types import QuantizedKeys
from dsa.testing.fuzz import attention, indexing, loss, projection, quantizing
from dsa.testing.fuzz.__main__ import main
from dsa.testing.fuzz.run import OPERATIONS, fuzz, try_case

SECONDS = 25
# All of these have been run, so that a faster machine tries no others. `make fuzz` tries new ones.
CASES = 3_000


def test_half_a_minute_finds_no_difference() -> None:
    result = fuzz(seed=0, seconds=SECONDS, cases=CASES)
    assert not result.failures, "\n".join(result.failures)
    assert set(result.counts) == set(OPERATIONS)


def reciprocal_of_a_lone_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
    """What the compiled kernel did once: zeros times the reciprocal of the sink's exponential, even if infinite."""
    if sink is None:
        return out
    broken = (lse == -torch.inf) & (1 / sink.float().exp()).isinf() & (sink.float().exp() > 0)
    return out.masked_fill(broken.unsqueeze(-1), torch.nan)


def broken(real: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    """The operation with its result changed."""

    def run(*arguments: Any, **options: Any) -> Any:
        return change(real(*arguments, **options), options)

    return run


def last_place_moved(selection: Tensor, options: dict[str, Any]) -> Tensor:
    """Every selection of more than one token begins one token earlier."""
    moved = selection.clone()
    moved[..., 0] = (moved[..., 0] - 1).clamp_min(-1).where(moved[..., 0] > 0, moved[..., 0])
    return moved


BREAKS: dict[str, tuple[Any, str, str, Callable[..., Any]]] = {
    "the lone sink, dense": (
        attention, "dense_attention", "dense_attention",
        lambda result, options: (reciprocal_of_a_lone_sink(*result, options["sink_logits"]), result[1]),
    ),
    "the lone sink, sparse": (
        attention, "sparse_attention", "sparse_attention",
        lambda result, options: (reciprocal_of_a_lone_sink(*result, options["sink_logits"]), result[1]),
    ),
    "a result one in a thousand too large": (
        attention, "dense_attention", "dense_attention", lambda result, _: (result[0] * 1.001, result[1])
    ),
    "lse without its last digits": (
        attention, "sparse_attention", "packed_attention", lambda result, _: (result[0], result[1] + 1e-4)
    ),
    "a gradient that forgets a tenth": (
        attention, "sparse_attention", "sparse_attention",
        lambda result, _: (result[0] * 0.9 + result[0].detach() * 0.1, result[1]),
    ),
    "head weights without their last digits": (
        projection, "index_projection", "index_projection",
        lambda made, _: made and (made[0], made[1] * (1 + 1e-4)),
    ),
    "a loss one in a hundred too large": (loss, "indexer_loss", "indexer_loss", lambda result, _: result * 1.01),
    "a wrong token": (indexing, "index_topk", "index_topk", last_place_moved),
    "a scale one place off": (
        quantizing, "quantize_index_keys", "quantize",
        lambda keys, _: QuantizedKeys(keys.data, keys.scale * (1 + 2.0**-20)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_put_in_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, operation, change = BREAKS[name]
    monkeypatch.setattr(module, function, broken(getattr(module, function), change))
    result = fuzz(seed=0, cases=300, operations=[operation])
    assert result.failures, f"not found in {result.counts[operation]} cases"
    command = result.failures[0].splitlines()[0].split()
    again = try_case(operation, int(command[command.index("--seed") + 1]), ("native", "reference"))
    assert again == result.failures[0]


def test_the_command_counts_and_says_how_to_repeat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "3", "--cases", "1", "--operation", "quantize"])
    assert main() == 0
    assert "1 cases from seed 3" in capsys.readouterr().out
    monkeypatch.setitem(OPERATIONS, "quantize", lambda draws: 1 / 0)
    assert main() == 1
    said = capsys.readouterr().out
    assert "python -m dsa.testing.fuzz --operation quantize --seed 3 --cases 1" in said
    assert "ZeroDivisionError" in said
