#!/usr/bin/env python3
"""Indexers that begin with random weights, and indexers fitted in closed form (`dsa train --start`), layer by layer.

    python benchmarks/start.py --train text.txt --unseen other.txt
    python benchmarks/start.py --train text.txt --unseen other.txt --layers 5,15,25 --json start.json

Both texts are read once, with dense attention. In each layer two indexers learn from the same queries of the first
text, one from random weights and one from the fit; after every few updates both are judged on the second text: the
loss (far target, nats), and before the first and after the last update the attention mass that their selection keeps,
over the best one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import dsa
from dsa import DSAConfig, LayerConfig
from dsa.bench.result import environment
from dsa.cli.train_indexers import parse_layers
from dsa.eval.mass import measure_layer
from dsa.models import config_of, indexers_of
from dsa.models.context import AttentionCall, DSAContext
from dsa.models.loading import load_model
from dsa.modules.indexer import Indexer
from dsa.ops import indexer_loss
from dsa.runs.inputs import encode, read_document
from dsa.train import WarmupSettings
from dsa.train.data import seeded
from dsa.train.layer import LayerTrainer, draw_queries, index_some

JUDGED = 256
"""Queries of the unseen text that judge."""

STARTS = ("random", "fitted")


def part_of(call: AttentionCall, text: int) -> AttentionCall:
    """One of the texts that were read together."""
    one = slice(text, text + 1)
    rows = {
        name: getattr(call, name)[one]
        for name in ("query", "key", "value", "hidden_states", "index_query", "index_weight", "key_start", "key_end")
    }
    rope = call.rope and (call.rope[0][:1], call.rope[1][:1])
    return dataclasses.replace(call, **rows, rope=rope, index_key=None, indices=None)


class Comparison:
    """An observer that trains both indexers of each layer as its activations pass.

    Args:
        indexers: Random ones, by layer.
        config: What the model is attached with.
        settings: Resolved; of one step.
        every: Updates between judgements.
    """

    def __init__(self, indexers: dict[int, Indexer], config: DSAConfig, settings: WarmupSettings, every: int) -> None:
        self.indexers, self.config, self.settings, self.every = indexers, config, settings, every
        self.layers: list[dict[str, Any]] = []

    def __call__(self, call: AttentionCall) -> None:
        seen, unseen = part_of(call, 0), part_of(call, 1)
        first = self.settings.first_query(self.config, call.layer)
        tokens = call.query.shape[1]
        drawn = draw_queries(
            torch.arange(first, tokens),
            self.settings.queries_per_update,
            self.settings.updates_per_sequence,
            seeded(self.settings.seed, call.layer),
        )[:, None]
        judged = torch.linspace(tokens // 2, tokens - 1, JUDGED).long()[None]
        row: dict[str, Any] = {"layer": call.layer}
        for start in STARTS:
            trainer = LayerTrainer(call.layer, self.indexers[call.layer], self.config, self.settings)
            began = time.perf_counter()
            if start == "fitted":
                trainer.fit(seen, drawn)
            fit_seconds = time.perf_counter() - began
            kl, mass = [self.loss(trainer, unseen, judged)], [self.mass(trainer, unseen)]
            began = time.perf_counter()
            for done in range(0, len(drawn), self.every):
                trainer.train(seen, drawn[done : done + self.every], done // self.every)
                kl.append(self.loss(trainer, unseen, judged))
            seconds = time.perf_counter() - began
            mass.append(self.mass(trainer, unseen))
            row[start] = {"kl": kl, "mass_over_oracle": mass, "fit_seconds": fit_seconds, "seconds": seconds}
        self.layers.append(row)
        show(f"{call.layer:>5}", row, self.every)

    @torch.no_grad()
    def loss(self, trainer: LayerTrainer, call: AttentionCall, rows: torch.Tensor) -> float:
        index = index_some(trainer.indexer, call.hidden_states, call.rope, rows)
        place = torch.zeros_like(rows), rows
        found = indexer_loss(
            index.query,
            index.key,
            index.weight,
            call.query[place],
            call.key,
            attention_scale=call.scale,
            key_start=call.key_start[place],
            key_end=call.key_end[place],
            sinks=trainer.sinks,
            local=trainer.local,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
        )
        return float(found)

    @torch.no_grad()
    def mass(self, trainer: LayerTrainer, call: AttentionCall) -> float:
        index = trainer.indexer(call.hidden_states.float(), call.rope)
        ours = dataclasses.replace(call, index_query=index.query, index_key=index.key, index_weight=index.weight)
        measured = measure_layer(ours, self.config, call.query.shape[1] - JUDGED)
        return measured.dsa / measured.oracle


def updates_saved(random: list[float], fitted: list[float], every: int) -> list[dict[str, float | None]]:
    """For each judgement of the fitted start: after how many updates random weights are as good, between two
    judgements on a straight line; `None` where they never are."""
    rows: list[dict[str, float | None]] = []
    for place, reached in enumerate(fitted):
        needed = None
        for after in range(len(random)):
            if random[after] <= reached:
                before = random[after - 1] if after else random[0]
                share = (before - reached) / (before - random[after]) if after and before > random[after] else 1.0
                needed = (after - 1 + share) * every if after else 0.0
                break
        rows.append({"fitted_updates": place * every, "kl": reached, "random_updates": needed})
    return rows


def show(name: str, row: dict[str, Any], every: int) -> None:
    """A layer's, or the mean's, two curves."""
    for start in STARTS:
        curve = " ".join(f"{value:6.3f}" for value in row[start]["kl"])
        mass = " to ".join(f"{value:.3f}" for value in row[start]["mass_over_oracle"])
        print(f"{name}  {start:<7} KL every {every} updates {curve}   mass {mass}", flush=True)


def mean_of(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the layers, place by place."""
    return {
        start: {
            name: [sum(values) / len(values) for values in zip(*(layer[start][name] for layer in layers), strict=True)]
            for name in ("kl", "mass_over_oracle")
        }
        for start in STARTS
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--train", required=True, metavar="FILE", help="UTF-8 text to learn from")
    parser.add_argument("--unseen", required=True, metavar="FILE", help="UTF-8 text to judge on")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--layers", type=parse_layers, metavar="5,15,25", help="by default all but the first")
    parser.add_argument("--updates", type=int, default=96)
    parser.add_argument("--every", type=int, default=12, help="updates between judgements")
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--index-heads", type=int, default=4)
    parser.add_argument("--index-head-dim", type=int, default=32)
    parser.add_argument("--index-rope-dim", type=int, help="by default a quarter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    try:
        loaded = load_model(given.model, device="cpu")
        texts = [encode(read_document(path), loaded.tokenizer, given.tokens) for path in (given.train, given.unseen)]
        everything = range(loaded.model.config.get_text_config().num_hidden_layers)
        layers = given.layers or list(everything[1:])
        sizes = {"index_heads": given.index_heads, "index_head_dim": given.index_head_dim}
        torch.manual_seed(given.seed)
        config = DSAConfig(
            top_k=given.top_k,
            **sizes,
            index_rope_dim=given.index_rope_dim,
            layers={layer: LayerConfig(dense=True) for layer in everything if layer not in layers},
        )
        dsa.attach(loaded.model, config)
        settings = WarmupSettings(
            steps=-(-given.updates // given.every),
            seq_len=given.tokens,
            updates_per_sequence=given.updates,
            start="fitted",
            seed=given.seed,
        ).resolved(config, layers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    observer = Comparison(indexers_of(loaded.model), config_of(loaded.model), settings, given.every)
    with torch.no_grad():
        context = DSAContext(mode="dense", observer=observer)
        loaded.model(torch.cat(texts), use_cache=False, logits_to_keep=1, dsa_context=context)
    mean = mean_of(observer.layers)
    show(" mean", mean, given.every)
    saved = updates_saved(*(mean[start]["kl"] for start in STARTS), given.every)
    for row in saved:
        needed = "never in this run" if row["random_updates"] is None else f"after {row['random_updates']:.0f}"
        print(f"KL {row['kl']:.3f}: fitted after {row['fitted_updates']} updates, random {needed}")
    if given.json is not None:
        plain = {
            "texts": {"train": Path(given.train).stem, "unseen": Path(given.unseen).stem},
            "tokens": given.tokens,
            "config": config.to_dict(),
            "settings": settings.to_dict(),
            "layers": observer.layers,
            "mean": mean,
            "steps_to_the_same_kl": saved,
            "environment": environment(),
        }
        given.json.write_text(json.dumps(plain, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
