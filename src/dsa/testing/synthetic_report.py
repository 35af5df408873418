"""An explanation of any length made up from a seed, without a model: what a report of a very long text weighs.

Everything has the shape and about the entropy of a real one: words of a made-up language on pages of 400 tokens,
selections that favour the recent and a few passages, attention that falls off like a power.

Shapes: `n` tokens of the prompt, `K` top-k.
"""

from __future__ import annotations

import random

import torch

from dsa.config import DSAConfig, LayerConfig
from dsa.documents.prompt import Prompt
from dsa.generation.passages import cut
from dsa.models.attached import AttachReport, LayerReport
from dsa.report.explanation import Cost, Explanation, Written
from dsa.report.recording import PARTS, LayerCounts, Recorder, Row

PAGE = 400
"""Tokens of a page."""

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def synthetic_explanation(
    tokens: int, *, top_k: int = 1024, layers: int = 30, asked: int = 48, answered: int = 48, seed: int = 0
) -> Explanation:
    """An explanation whose first layer is dense.

    Args:
        tokens: `n`, the question included.
        top_k: `K`.
        layers: How many layers the model has.
        asked: Tokens of the question.
        answered: Tokens of the answer.
        seed: Of everything in it.
    """
    config = DSAConfig(top_k=top_k, sinks=4, local=min(256, top_k // 4), layers={0: LayerConfig(dense=True)})
    generator = torch.Generator().manual_seed(seed)
    prompt = _prompt(tokens, asked, random.Random(seed))
    answer = [Written(f" {place}", 0.5) for place in range(answered)]
    recorder = Recorder(config, tokens, tokens - asked, asked - 1 + answered, layers)
    for layer in range(layers):
        dense = layer == 0
        chosen = torch.rand(tokens, generator=generator) ** 6 * torch.arange(tokens, 0, -1)
        recorder.counts[layer] = LayerCounts(
            layer,
            top_k=None if dense else top_k,
            local=0 if dense else config.local,
            selected=(torch.zeros(tokens) if dense else chosen).int(),
            read=tokens * min(tokens // 2, tokens if dense else top_k),
            sampled=0 if dense else 256,
            kept=0.0 if dense else 246.0,
            window_kept=0.0 if dense else 210.0,
        )
    recorder.distance_sum = 8 + 8 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    recorder.distance_count = torch.ones(tokens, dtype=torch.float64)
    recorder.parts = torch.rand(PARTS * PARTS, generator=generator, dtype=torch.float64)
    for query in range(tokens - asked, tokens - 1 + answered):
        recorder.rows[query] = {
            layer: _row(query, query + 1 if layer == 0 else top_k, config, recorder.entries, generator)
            for layer in range(layers)
        }
    kinds = [
        LayerReport(layer, "sparse", top_k, config.local) if layer else LayerReport(layer, "dense")
        for layer in range(layers)
    ]
    pages = [*prompt.pages, *[None] * answered]
    parts = [*prompt.parts, *["answer"] * answered]
    return Explanation(
        model="synthetic",
        document="synthetic.pdf",
        ask="What is it about?",
        prompt=prompt,
        answer=answer,
        report=AttachReport("SyntheticForCausalLM", tuple(kinds), True, 0, config),
        recorder=recorder,
        passages=cut([*prompt.texts, *(each.text for each in answer)], pages, parts),
        dsa=Cost(100.0, 0.1, 7000.0, top_k, 9000.0),
        dense=Cost(1000.0, 1.0, 6900.0, (tokens + 1) / 2, None, True),
        notes=[],
        environment={"machine": "none", "threads": 1, "dsa": "0", "torch": "0", "commit": None},
    )


def _prompt(tokens: int, asked: int, generator: random.Random) -> Prompt:
    words = ["".join(generator.choice(_SYLLABLES) for _ in range(generator.randint(1, 4))) for _ in range(8000)]
    # Frequent words are frequent, as in any language.
    texts = [f" {words[int(len(words) * generator.random() ** 3)]}" for _ in range(tokens)]
    for place in range(14, tokens, 15):
        texts[place] = ".\n" if place % 4 == 0 else "."
    inside = tokens - asked
    return Prompt(
        ids=[0] * tokens,
        texts=texts,
        pages=[1 + place // PAGE if place < inside else None for place in range(tokens)],
        parts=["document"] * inside + ["question"] * asked,
        document_tokens=inside,
    )


def _row(query: int, read: int, config: DSAConfig, entries: int, generator: torch.Generator) -> Row:
    """Sinks, the local window, and tokens between them at random distances, as many as are kept of `read`."""
    visible = query + 1
    kept = min(read, entries, visible)
    between = kept - config.sinks - config.local
    if kept == visible:
        positions = torch.arange(visible)
    else:
        steps = -torch.rand(between, generator=generator).clamp(min=1e-6).log()
        # Every one is at least one step after the last.
        spare = visible - kept - 1
        far = config.sinks + torch.arange(between) + (steps.cumsum(0) / steps.sum() * spare).long()
        positions = torch.cat((torch.arange(config.sinks), far, torch.arange(visible - config.local, visible)))
    weights = torch.rand(len(positions), generator=generator).clamp(min=1e-4) ** 8
    return Row(positions.int(), weights / weights.sum(), read, 0.96, 0.82, 0.14, int(0.8 * between))
