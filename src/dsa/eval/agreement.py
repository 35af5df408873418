"""How long greedy continuations agree with the dense model's, and how often each token does.

The dense model continues a text greedily from several places; every other reader is then given the same continuation
and asked, token by token, for its first choice. Where its first choice differs for the first time its own greedy
continuation would part from the dense one, so one pass gives both figures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from dsa.eval.comparison import CHUNK, ContextMaker, new_cache
from dsa.eval.interval import mean_interval
from dsa.models.rope import angles_for
from dsa.modules.cache import IndexedLayer


def places_in(tokens: int, start: int, count: int) -> list[int]:
    """At most `count` prompt lengths, evenly spaced from `start` to the whole text, at least 1."""
    first = max(1, start)
    count = min(count, tokens - first + 1)
    return sorted({round(each) for each in torch.linspace(first, tokens, count, dtype=torch.float64).tolist()})


@torch.no_grad()
def choices(
    model: Any,
    ids: torch.Tensor,
    places: Sequence[int],
    context: ContextMaker,
    new_tokens: int,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """First choices for the `new_tokens` tokens after every place.

    Args:
        model: An attached model.
        ids: int64 `[1, n]`.
        places: Prompt lengths, ascending.
        context: Makes the context of every pass.
        new_tokens: How many tokens.
        forced: What is read after each place; without it the model's own choices are.
    """
    ids = ids.to(model.device)
    cache = new_cache(model, ids.shape[1] + new_tokens)
    found, done = [], 0
    with angles_for(model, ids.shape[1] + new_tokens):
        for number, place in enumerate(places):
            # The last token of the prompt is read with what follows it.
            for chunk in ids[:, done : place - 1].split(CHUNK, dim=1):
                if chunk.shape[1]:
                    model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1, dsa_context=context())
            done = place - 1
            can_crop = bool(cache.layers) and all(isinstance(layer, IndexedLayer) for layer in cache.layers)
            own = cache if can_crop else copy.deepcopy(cache)
            last = ids[:, place - 1 : place]
            if forced is not None:
                following = torch.tensor([list(forced[number][:-1])], dtype=ids.dtype, device=ids.device)
                read = torch.cat((last, following), dim=1)
                output = model(read, past_key_values=own, use_cache=True, dsa_context=context())
                found.append(output.logits[0].argmax(dim=-1).tolist())
            else:
                made: list[int] = []
                for _ in range(new_tokens):
                    output = model(last, past_key_values=own, use_cache=True, logits_to_keep=1, dsa_context=context())
                    last = output.logits[:, -1:].argmax(dim=-1)
                    made.append(int(last))
                found.append(made)
            if can_crop:
                cache.crop(-new_tokens)
    return found


def agreement(own: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> dict[str, float | int | None]:
    """Of the first choices of a reader with the dense continuations it was given.

    Returns:
        `top1`: share of the tokens that are its first choice; `until_divergence`: tokens before the first that is
        not; each with the half-width of a 95 % interval over continuations (`None` for one); `identical`: share of
        the continuations that agree to the end.
    """
    same = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(own, dense, strict=True)]
    until = [each.index(False) if False in each else len(each) for each in same]
    top1, top1_half = mean_interval([sum(each) / len(each) for each in same])
    length, length_half = mean_interval([float(each) for each in until])
    return {
        "top1": top1,
        "top1_half_width": top1_half,
        "until_divergence": length,
        "until_divergence_half_width": length_half,
        "identical": sum(map(all, same)) / len(same),
        "continuations": len(same),
        "new_tokens": len(same[0]),
    }
