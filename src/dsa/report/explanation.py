"""What the report of a reading is made of: tokens, selections, passages, time, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from dsa.documents.prompt import Prompt
from dsa.generation.passages import Passage, tells
from dsa.models.attached import AttachReport
from dsa.report.passages import Reading, most_read, shares
from dsa.report.recording import Recorder


@dataclass(frozen=True)
class Cost:
    """Time, memory and tokens of one way to read. Seconds and MB (10^6 bytes); `None` where not known.

    Args:
        prefill_s: Reading the prompt.
        decode_s: One token after it.
        cache_mb: Keys and values of the prompt, and index keys where there are any.
        read: Tokens read per query and layer while reading the prompt, mean.
        peak_rss_mb: Peak resident memory of the process.
        is_estimated: Whether `prefill_s` was carried over from a measured part.
    """

    prefill_s: float | None
    decode_s: float | None
    cache_mb: float
    read: float
    peak_rss_mb: float | None
    is_estimated: bool = False


@dataclass(frozen=True)
class Written:
    """One token of the answer: its text, the probability that the model gave it, and whether it ends the text."""

    text: str
    probability: float
    is_end: bool = False


@dataclass
class Explanation:
    """What the report is made of.

    Args:
        model: What the model was asked for by.
        document: The document's name.
        ask: The question, if any.
        prompt: What was read.
        answer: What was written.
        report: What attaching did.
        recorder: The selections.
        passages: The whole text, answer included, in passages.
        dsa: What reading cost.
        dense: What dense attention costs in its place.
        notes: What a reader must know: untrained indexers, extrapolated positions, a document cut short.
        environment: Machine and versions.
    """

    model: str
    document: str
    ask: str | None
    prompt: Prompt
    answer: list[Written]
    report: AttachReport
    recorder: Recorder
    passages: list[Passage]
    dsa: Cost
    dense: Cost
    notes: list[str]
    environment: dict[str, Any]

    @property
    def queries(self) -> list[int]:
        """Positions of the queries whose selections are kept, ascending."""
        return sorted(self.recorder.rows)

    def query_of(self, answer_token: int) -> int:
        """The query that wrote a token of the answer: the one in front of it."""
        return len(self.prompt.ids) - 1 + answer_token

    def most_read(self, query: int, count: int = 10) -> list[Reading]:
        """The passages that distinguish what a query read, over all layers that select."""
        return most_read(self._shares[query], self._usual, count, torch.tensor(self.says))

    @cached_property
    def says(self) -> list[bool]:
        """Which passages say something: white space, bare numbers and running headers do not. Of the document only."""
        told = tells(self.passages, [self.text(each.start, each.end) for each in self.passages])
        return [says or each.part != "document" for each, says in zip(self.passages, told, strict=True)]

    @cached_property
    def _shares(self) -> dict[int, torch.Tensor]:
        """fp32 `[passages]` by kept query: the attention on each passage."""
        lengths = torch.tensor([each.end - each.start for each in self.passages])
        passage_of = torch.arange(len(self.passages)).repeat_interleave(lengths)
        sinks, selecting = self.recorder.config.sinks, self.selecting()
        return {query: shares(rows, query, passage_of, sinks, selecting) for query, rows in self.recorder.rows.items()}

    @cached_property
    def _usual(self) -> torch.Tensor:
        """fp32 `[passages]`: the median over all kept queries, the lower of two."""
        return torch.stack(list(self._shares.values())).median(dim=0).values

    def selecting(self) -> dict[int, int]:
        """The layers that do not read everything, with the number of last tokens that they always read."""
        return {layer: each.local for layer, each in self.recorder.counts.items() if each.top_k is not None}

    @property
    def answer_text(self) -> str:
        """What the model wrote, without the token that ends it."""
        return "".join(each.text for each in self.answer if not each.is_end)

    @property
    def mass_kept(self) -> float | None:
        """Share of dense attention that the selections hold, mean over layers and sampled tokens of the prompt."""
        return _mean([each.kept / each.sampled for each in self.recorder.counts.values() if each.sampled])

    @property
    def mass_kept_window(self) -> float | None:
        """The same for sinks and a window of the same budget."""
        return _mean([each.window_kept / each.sampled for each in self.recorder.counts.values() if each.sampled])

    def text(self, start: int, end: int) -> str:
        """The text of some tokens, the answer's after the prompt's."""
        texts = self.prompt.texts
        return "".join(
            texts[place] if place < len(texts) else self.answer[place - len(texts)].text for place in range(start, end)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: figures, and the most read passages of every token of the answer."""
        tokens = []
        for number, written in enumerate(self.answer):
            rows = [
                row for layer, row in self.recorder.rows[self.query_of(number)].items() if layer in self.selecting()
            ]
            tokens.append(
                {
                    **asdict(written),
                    "window_missed": _mean([row.outside for row in rows]),
                    "kept": _mean([row.kept for row in rows]),
                    "window_kept": _mean([row.window_kept for row in rows]),
                    "passages": [
                        {
                            "page": self.passages[each.passage].page,
                            "part": self.passages[each.passage].part,
                            "share": each.share,
                            "usual": each.usual,
                            "text": self.text(self.passages[each.passage].start, self.passages[each.passage].end),
                        }
                        for each in self.most_read(self.query_of(number))
                    ],
                }
            )
        return {
            "model": self.model,
            "document": self.document,
            "ask": self.ask,
            "prompt_tokens": len(self.prompt.ids),
            "document_tokens": self.prompt.parts.count("document"),
            "answer": self.answer_text,
            "tokens": tokens,
            "mass_kept": self.mass_kept,
            "mass_kept_window": self.mass_kept_window,
            "dsa": asdict(self.dsa),
            "dense": asdict(self.dense),
            "config": self.report.config.to_dict(),
            "indexers_trained": self.report.trained,
            "notes": self.notes,
            "environment": self.environment,
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
