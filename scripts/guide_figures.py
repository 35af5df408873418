#!/usr/bin/env python3
"""Draws the figures of docs/guide.md and docs/training.md from the records in benchmarks/results.

    python scripts/guide_figures.py
    python scripts/guide_figures.py --measure benchmarks/results/2026-11-25-guide-attention.json

`--measure` first reads 4,096 tokens of the Python language reference with the default model and writes such a record:
what each layer attends to, and what selections of 512 tokens hold of it. It takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dsa.config import DSAConfig
from dsa.eval.layers import indexer_selection, kept_by
from dsa.eval.mass import mean_probabilities
from dsa.eval.selections import selection
from dsa.models.context import AttentionCall, DSAContext

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OTHERS = ("window", "pattern", "blocks", "random")
NAMES = {
    "oracle": "best possible",
    "dsa": "DSA",
    "window": "4 sinks + window",
    "pattern": "every m-th + window",
    "blocks": "blocks of 32",
    "random": "random",
}
COLORS = {"oracle": "#6b7280", "dsa": "#1d4ed8", "window": "#b45309", "pattern": "#a21caf", "blocks": "#0f766e"}


class Attention:
    """An observer of a dense pass: what every layer attends to, and what selections hold of it.

    Args:
        config: What the model is attached with.
        mapped: The layer whose attention is kept as a map.
        cells: Stretches of the text along each side of the map.
    """

    def __init__(self, config: DSAConfig, mapped: int, cells: int) -> None:
        self.selections = {"dsa": indexer_selection(config)} | {name: selection(name, config) for name in OTHERS}
        self.config, self.mapped, self.cells = config, mapped, cells
        self.layers: list[dict[str, Any]] = []
        self.map: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, call: AttentionCall) -> None:
        tokens = call.query.shape[1]
        part = _queries(call, slice(tokens // 2, None, 16))
        mass = _probabilities(part)
        counts = [2**power for power in range(tokens.bit_length())]
        held = mass.sort(dim=1, descending=True).values.cumsum(dim=1)[:, [count - 1 for count in counts]]
        row: dict[str, Any] = {"layer": call.layer, "best": dict(zip(counts, _rounded(held.mean(dim=0)), strict=True))}
        if call.index_query is not None:
            chosen = {name: select(part) for name, select in self.selections.items()}
            kept = kept_by(part, chosen, self.config.layer_top_k(call.layer))
            row["mass"] = {name[5:]: round(float(each.mean()), 4) for name, each in kept.items() if name[:5] == "mass "}
        self.layers.append(row)
        if call.layer == self.mapped:
            self.map = self._map_of(call)

    def _map_of(self, call: AttentionCall) -> dict[str, Any]:
        """By stretch of queries and of keys: the attention there, and the share of its pairs that is read."""
        size = call.query.shape[1] // self.cells
        found: dict[str, Any] = {"layer": call.layer, "attention": []}
        for begin in range(0, call.query.shape[1], size):
            mass = _probabilities(_queries(call, slice(begin, begin + size)))
            found["attention"].append(_rounded(mass.view(size, self.cells, size).sum(dim=2).mean(dim=0)))
        for name in ("dsa", "window", "pattern"):
            read = torch.zeros(self.cells, self.cells)
            indices = self.selections[name](call)[0]
            rows = torch.arange(len(indices))[:, None].expand_as(indices)[indices >= 0] // size
            columns = indices[indices >= 0].long() // size
            read.index_put_((rows, columns), torch.ones(len(rows)), accumulate=True)
            found[name] = [_rounded(line) for line in read / size**2]
        return found


def _queries(call: AttentionCall, rows: slice) -> AttentionCall:
    """The same call with some of its queries."""
    names = (
        "query",
        "key_start",
        "key_end",
        *(("index_query", "index_weight") if call.index_query is not None else ()),
    )
    return dataclasses.replace(call, **{name: getattr(call, name)[:, rows] for name in names})


def _probabilities(call: AttentionCall) -> torch.Tensor:
    """Mean over heads, fp32 `[T, S]`."""
    query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
    return mean_probabilities(query, key, call, call.key_start, call.key_end)[0]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def measure(file: Path, tokens: int, top_k: int, mapped: int) -> None:
    """Reads the text once, dense, and writes what was seen."""
    from dsa.models import config_of
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers
    from dsa.runs.inputs import encode, read_document
    from dsa.runs.machine import describe_machine

    loaded, document = load_model("default", device="cpu"), read_document()
    attach_indexers(loaded, top_k=top_k)
    seen = Attention(config_of(loaded.model), mapped, cells=64)
    context = DSAContext(mode="dense", observer=seen, every_layer=True)
    with torch.no_grad():
        ids = encode(document, loaded.tokenizer, tokens)
        loaded.model(ids, use_cache=False, logits_to_keep=1, dsa_context=context)
    record = {
        "benchmark": "what layers attend to, and what selections hold of it",
        "date": date.today().isoformat(),
        "model": loaded.name,
        "document": document.name,
        "tokens": tokens,
        "top_k": top_k,
        "queries": "every 16th of the second half; the map has all",
        "config": config_of(loaded.model).to_dict(),
        "layers": seen.layers,
        "map": seen.map,
        "environment": describe_machine(),
    }
    file.write_text(json.dumps(record) + "\n")


def draw_map(record: dict[str, Any], file: Path) -> None:
    """One layer's attention next to what three selections read of it."""
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    maps, tokens = record["map"], record["tokens"]
    shares = next(row["mass"] for row in record["layers"] if row["layer"] == maps["layer"])
    figure, axes = pyplot.subplots(2, 2, figsize=(7.2, 7.6), sharex=True, sharey=True)
    for place, name in zip(axes.ravel(), ("attention", "dsa", "window", "pattern"), strict=True):
        # What no query sees stays white; what is hardly read at all does not.
        values = torch.tensor(maps[name]).clamp_min(1e-9)
        values = values.masked_fill(torch.ones_like(values).triu(1).bool(), float("nan"))
        norm, colors = (LogNorm(2e-3, 0.5), "magma_r") if name == "attention" else (LogNorm(5e-3, 1.0), "Blues")
        norm.clip = True
        place.imshow(values, extent=(0, tokens, tokens, 0), norm=norm, cmap=colors)
        if name == "attention":
            place.set_title(f"attention of layer {maps['layer']}")
        else:
            place.set_title(f"{NAMES[name]}: holds {shares[name]:.0%}")
    for place in axes[1]:
        place.set_xlabel("position read")
    for place in axes[:, 0]:
        place.set_ylabel("query's position")
    _save(figure, file)


def draw_kept(record: dict[str, Any], file: Path) -> None:
    """What selections hold of the attention, layer by layer."""
    from matplotlib import pyplot

    figure, place = pyplot.subplots(figsize=(7.2, 4))
    for name, color in COLORS.items():
        rows = [row for row in record["layers"] if "mass" in row]
        style = {"linewidth": 2.2 if name == "dsa" else 1.3, "linestyle": ":" if name == "oracle" else "-"}
        place.plot([r["layer"] for r in rows], [r["mass"][name] for r in rows], label=NAMES[name], color=color, **style)
    place.set(xlabel="layer", ylabel="share of the attention held", ylim=(None, 1.005))
    place.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, file)


def draw_best(record: dict[str, Any], file: Path) -> None:
    """How many tokens hold how much of a layer's attention."""
    from matplotlib import pyplot

    figure, place = pyplot.subplots(figsize=(7.2, 3.8))
    rows = sorted(record["layers"], key=lambda row: row["best"][str(record["top_k"])])
    for number, row in enumerate(rows):
        named = {0: f"layer {row['layer']}", len(rows) // 2: "the median layer"}.get(number)
        color = {0: "#b45309", len(rows) // 2: "#111827"}.get(number, "#d1d5db")
        points = [(int(count), share) for count, share in row["best"].items()]
        order, width = (3, 2.2) if named else (1, 0.8)
        place.plot(*zip(*points, strict=True), color=color, label=named, zorder=order, linewidth=width)
    place.axvline(record["top_k"], color="#6b7280", linewidth=1, linestyle=":")
    place.set_xscale("log", base=2)
    ticks = [1, 4, 16, 64, 256, 1024, 4096]
    place.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    place.set(xlabel="tokens, the best ones of each query", ylabel="share of the attention", ylim=(0, 1.02))
    place.legend(frameon=False)
    _save(figure, file)


def draw_quality(record: dict[str, Any], file: Path) -> None:
    """Perplexity over that of the dense model, by budget: all texts with intervals, and DSA on each by itself."""
    from matplotlib import pyplot

    figure, place = pyplot.subplots(figsize=(7.2, 3.8))
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    pool = max(len(row["texts"]) for row in record["rows"])
    for row in record["rows"]:
        if row["row"] == "perplexity" and row["reader"] in COLORS and len(row["texts"]) in (1, pool):
            lines.setdefault((row["reader"], row["text"]), []).append(row)
    for (reader, text), rows in lines.items():
        rows.sort(key=lambda row: row["config"]["top_k"])
        budgets, losses = [row["config"]["top_k"] for row in rows], [100 * (row["ratio"] - 1) for row in rows]
        if len(rows[0]["texts"]) > 1:
            spread = [[100 * (r["ratio"] - r["low"]) for r in rows], [100 * (r["high"] - r["ratio"]) for r in rows]]
            label = f"{NAMES[reader]}, {text}, 95 % intervals"
            place.errorbar(budgets, losses, spread, marker="o", capsize=3, color=COLORS[reader], label=label)
        elif reader == "dsa":
            place.plot(budgets, losses, color="#d1d5db", linewidth=1, zorder=1)
            place.annotate(text, (budgets[0], losses[0]), (-6, -3), textcoords="offset points", fontsize=8, ha="right")
    ticks = sorted({row["config"]["top_k"] for rows in lines.values() for row in rows})
    place.set_xscale("log", base=2)
    place.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    place.set(xlabel="K, tokens read per query", ylabel="perplexity above dense, %", xlim=(ticks[0] / 2.8, None))
    place.legend(frameon=False)
    _save(figure, file)


def draw_work(file: Path) -> None:
    """Operations a token of one layer of the default model, decoded after n tokens."""
    from matplotlib import pyplot

    from dsa.cost.attention import AttentionShape, layer_cost

    shape = AttentionShape(heads=9, kv_heads=3, key_dim=64, value_dim=64, index_heads=4, index_head_dim=32)
    lengths = [2**power for power in range(8, 18)]
    dense = [layer_cost(shape, "dense", n, n) for n in lengths]
    sparse = [layer_cost(shape, "sparse", n, n, 1024) for n in lengths]
    lines = {
        "dense attention": ([cost.operations for cost in dense], "#b45309", "-"),
        "DSA, K = 1,024": ([cost.operations for cost in sparse], "#1d4ed8", "-"),
        "of it, attention": ([cost.tokens_read * shape.operations_per_token_read for cost in sparse], "#1d4ed8", ":"),
        "of it, the indexer": (
            [cost.tokens_scanned * shape.operations_per_token_scanned or float("nan") for cost in sparse],
            "#0f766e",
            ":",
        ),
    }
    figure, place = pyplot.subplots(figsize=(7.2, 3.8))
    for name, (values, color, style) in lines.items():
        place.plot(lengths, values, label=name, color=color, linestyle=style)
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    ticks = lengths[::3]
    place.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    place.set(xlabel="tokens before the query", ylabel="operations, one query, one layer")
    place.legend(frameon=False)
    _save(figure, file)


def draw_time(record: dict[str, Any], file: Path) -> None:
    """Milliseconds a decoded token over the tokens cached, dense and DSA."""
    from matplotlib import pyplot

    # After a prompt that was read, or in a cache filled with numbers: which of them changes no time.
    rows = [row for row in record["rows"] if row["name"] in ("decode", "prompt") and row["length"]]
    rows.sort(key=lambda row: row["length"])
    figure, place = pyplot.subplots(figsize=(7.2, 3.8))
    lines = (("SDPA", "transformers + SDPA", "#b45309", 7), ("DSA", "DSA, K = 1,024", "#1d4ed8", -15))
    for name, label, color, above in lines:
        keys = {"decode": name, "prompt": f"{name} token"}
        points = [(row["length"], 1000 * row["timings"][keys[row["name"]]]["median_s"]) for row in rows]
        place.plot(*zip(*points, strict=True), marker="o", label=label, color=color)
        for length, milliseconds in points:
            style = {"textcoords": "offset points", "ha": "center"}
            place.annotate(f"{milliseconds:,.0f}", (length, milliseconds), (0, above), **style)
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.set_xticks([row["length"] for row in rows], [f"{row['length']:,}" for row in rows])
    place.set(xlabel="tokens cached", ylabel="milliseconds a token", xlim=(6500, 170000), ylim=(30, 5000))
    place.legend(frameon=False)
    _save(figure, file)


def draw_start(record: dict[str, Any], file: Path) -> None:
    """Held-out loss over updates, from random weights and from the fit: each layer, and their mean."""
    from matplotlib import pyplot

    figure, place = pyplot.subplots(figsize=(7.2, 3.8))
    every = record["settings"]["updates_per_sequence"] // record["settings"]["steps"]
    for start, color in (("random", "#b45309"), ("fitted", "#1d4ed8")):
        curves = [(layer[start]["kl"], {"alpha": 0.3, "linewidth": 1}) for layer in record["layers"]]
        label = f"{start}, mean of {len(record['layers'])} layers"
        for losses, style in [*curves, (record["mean"][start]["kl"], {"marker": "o", "label": label})]:
            place.plot([every * step for step in range(len(losses))], losses, color=color, **style)
    place.set_yscale("log")
    ticks = [0.2, 0.5, 1, 2, 5]
    place.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    place.minorticks_off()
    place.set(
        xlabel=f"updates of {record['settings']['queries_per_update']} queries", ylabel="KL on another text, nats"
    )
    place.legend(frameon=False)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    for place in figure.axes:
        place.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    # Neither a date nor random names: the same record draws the same file.
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, dpi=150, metadata=metadata)
    pyplot.close(figure)
    print(file.relative_to(ROOT))


def newest(ending: str) -> dict[str, Any]:
    """The latest record of a kind: their names begin with the date."""
    files = sorted(RESULTS.glob(f"*-{ending}.json"))
    if not files:
        raise SystemExit(f"no *-{ending}.json in {RESULTS.relative_to(ROOT)}; see docs/benchmarks.md")
    return json.loads(files[-1].read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="make the record of the attention anew")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--layer", type=int, default=3, help="the layer whose attention is shown as a map")
    given = parser.parse_args()
    if given.measure is not None:
        measure(given.measure, given.tokens, given.top_k, given.layer)
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dsa", "font.size": 11})
    images = ROOT / "docs" / "images"
    attention = newest("guide-attention")
    draw_map(attention, images / "guide-map.png")
    draw_kept(attention, images / "guide-kept.svg")
    draw_best(attention, images / "guide-best.svg")
    draw_quality(newest("quality-perplexity"), images / "guide-quality.svg")
    draw_work(images / "guide-work.svg")
    draw_time(newest("e2e"), images / "guide-time.svg")
    draw_start(newest("start"), images / "training-start.svg")


if __name__ == "__main__":
    main()
