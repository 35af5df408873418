"""Which passages of a text a token read most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.report.recording import Row


@dataclass(frozen=True)
class Reading:
    """How much a token read of one passage.

    Args:
        passage: Its number.
        share: Attention on its tokens, mean over layers, without sinks and the local window.
        usual: The median of that over all tokens whose reading is kept.
    """

    passage: int
    share: float
    usual: float

    @property
    def excess(self) -> float:
        """What distinguishes this token's reading: passages that every token reads come last."""
        return self.share - self.usual


def shares(rows: dict[int, Row], query: int, passage_of: Tensor, sinks: int, locals_: dict[int, int]) -> Tensor:
    """Attention of one query on each passage beyond sinks and local window, mean over the layers that select.

    Args:
        rows: What the query read, by layer.
        query: Its position.
        passage_of: int64 `[n]`, the number of every token's passage, ascending.
        sinks: Tokens at the start that are always read.
        locals_: By layer that selects: how many of the last are always read.

    Returns:
        fp32 `[passages]`.
    """
    found = torch.zeros(int(passage_of[-1]) + 1)
    layers = [layer for layer in rows if layer in locals_]
    for layer in layers:
        row = rows[layer]
        far = (row.positions >= sinks) & (row.positions < query + 1 - locals_[layer])
        found.index_add_(0, passage_of[row.positions[far].long()], row.weights[far] / len(layers))
    return found


def most_read(own: Tensor, usual: Tensor, count: int, says: Tensor | None = None) -> list[Reading]:
    """The passages that one token read most beyond what is usual.

    Args:
        own: fp32 `[passages]`, `shares` of this token.
        usual: The median of that over all kept queries: a mean would be high on the very passages that a question is
            about, since its own tokens and those of the answer read them.
        count: How many to return at most; passages that were not read are none of them.
        says: bool `[passages]`: which of them say something; `None` takes all.
    """
    read = (own if says is None else own * says).nonzero().flatten()
    best = (own - usual)[read].sort(descending=True, stable=True).indices[:count]
    return [Reading(int(each), float(own[each]), float(usual[each])) for each in read[best]]
