"""What the replies to needles come to, by depth and over all, next to dense attention's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsa.eval.interval import mean_interval
from dsa.eval.needle_kinds import DEPTHS
from dsa.eval.needles import Reply


@dataclass(frozen=True)
class Cell:
    """One length and depth, over haystacks. An answer of several parts counts part by part.

    Args:
        length: Tokens of the haystacks.
        depth: The tenth in which the needles lie, or begin, 0 to 9; `None` for all of them together.
        asked: Answers asked for.
        compared: Those that dense attention found: the differences are over them.
        difference: Mean difference of the answer's log-probability to dense attention's, nats per answer; `None`
            where dense attention found none.
        half_width: Of its 95 % interval (Student's t over haystacks); `None` for fewer than two.
        difference_per_token: The same difference, per token of the answer.
        found: Share of all answers that the reader found.
        found_half_width: Of its 95 % interval, from the haystacks' shares; `None` for one haystack.
        found_dense: Share of all answers that dense attention found.
        log_probability: Mean over all answers, found or not, nats per answer.
        log_probability_dense: The same of dense attention.
    """

    length: int
    depth: int | None
    asked: int
    compared: int
    difference: float | None
    half_width: float | None
    difference_per_token: float | None
    found: float
    found_half_width: float | None
    found_dense: float
    log_probability: float
    log_probability_dense: float

    @property
    def is_lower(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.difference is not None and self.half_width is not None and self.difference + self.half_width < 0


Replies = Mapping[str, Sequence[Reply]]
"""Replies to one haystack's questions, needle by needle, by reader; `"dense"` among them."""


def cells(length: int, haystacks: Iterable[Replies], reader: str) -> list[Cell]:
    """One cell per depth, and one for all depths (a haystack's mean is then one observation).

    Args:
        length: Tokens of the haystacks.
        haystacks: What was replied, one item per haystack.
        reader: Who is compared with dense attention.
    """
    pairs = [list(zip(replies[reader], replies["dense"], strict=True)) for replies in haystacks]
    by_depth = [[[pair for pair in each if pair[0].depth == depth] for each in pairs] for depth in range(DEPTHS)]
    return [*(_cell(length, depth, groups) for depth, groups in enumerate(by_depth)), _cell(length, None, pairs)]


def _cell(length: int, depth: int | None, groups: list[list[tuple[Reply, Reply]]]) -> Cell:
    """A cell over haystacks, of which each brings some pairs `(reader, dense)`."""
    pairs = [pair for group in groups for pair in group]
    compared = [[pair for pair in group if pair[1].found] for group in groups]
    compared = [group for group in compared if group]
    difference, half_width, per_token = None, None, None
    if compared:
        difference, half_width = mean_interval([_mean(_difference(*pair) for pair in group) for group in compared])
        per_token = _mean(_mean(_difference(*pair) / pair[0].tokens for pair in group) for group in compared)
    return Cell(
        length=length,
        depth=depth,
        asked=len(pairs),
        compared=sum(map(len, compared)),
        difference=difference,
        half_width=half_width,
        difference_per_token=per_token,
        found=_mean(float(own.found) for own, _ in pairs),
        found_half_width=mean_interval([_mean(float(own.found) for own, _ in group) for group in groups])[1],
        found_dense=_mean(float(dense.found) for _, dense in pairs),
        log_probability=_mean(own.log_probability for own, _ in pairs),
        log_probability_dense=_mean(dense.log_probability for _, dense in pairs),
    )


def _difference(own: Reply, dense: Reply) -> float:
    return own.log_probability - dense.log_probability


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
