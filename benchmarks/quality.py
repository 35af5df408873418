#!/usr/bin/env python3
"""What sparse attention keeps: perplexity, attention mass and needles, next to dense attention and other selections.

    python benchmarks/quality.py perplexity texts/*.txt --json quality.json
    python benchmarks/quality.py perplexity demo --top-k 1024 --selections dsa window blocks oracle
    python benchmarks/quality.py perplexity texts/*.txt --tokens 32768 --start 16384 --top-k 2048 --rope-scaling yarn:4
    python benchmarks/quality.py mass texts/*.txt --top-k 1024
    python benchmarks/quality.py needles texts/*.txt --lengths 2048 4096 8192 --haystacks 12

`demo` is the Python language reference that `dsa demo` reads. Every row is printed, and written to `--json`, as soon
as it is there; rows already in that file stay, those measured again with the same settings are replaced. With
`--losses DIR`, perplexity runs keep the losses of every pass there and find them again, so that a run can be cut short
and its texts taken one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsa.bench.result import environment
from dsa.config import DSAConfig
from dsa.eval.comparison import READERS, attached, budget, contexts, text_losses
from dsa.eval.mass import LayerMass, MassObserver
from dsa.eval.needle_cells import cells
from dsa.eval.needles import ask, make_haystack
from dsa.eval.ratio import PerplexityRatio, perplexity_ratio
from dsa.models.attachment import Attachment, take_off
from dsa.models.context import DSAContext
from dsa.models.extension import scaling_wanted
from dsa.models.loading import LoadedModel, load_model
from dsa.models.sparse import attach_indexers
from dsa.runs.files import check_writable, write_json
from dsa.runs.inputs import Document, encode, read_document

FORMAT = "dsa quality 1"
ALL_TEXTS = "all texts"
KEY = (
    "row",
    "model",
    "indexers",
    "text",
    "texts",
    "tokens",
    "start",
    "config",
    "reader",
    "rope_scaling",
    "length",
    "seed",
)
"""Settings that tell rows apart; a row has those that mean something to it."""


class Results:
    """Rows, printed and written as they come."""

    def __init__(self, path: Path | None, common: dict[str, Any]) -> None:
        self.path, self.common, self.rows = path, common, []
        if path is not None:
            check_writable(path)
            if path.exists():
                plain = json.loads(path.read_text(encoding="utf-8"))
                if plain.get("format") != FORMAT:
                    raise ValueError(f"json: {path} holds no results of this command; give the name of a new file")
                self.rows = plain["rows"]

    def add(self, line: str, **row: Any) -> None:
        print(line, flush=True)
        # As JSON gives it back, so that rows of this run and of the file compare equal.
        new = json.loads(json.dumps({**self.common, **row, "environment": environment()}))
        key = [new.get(name) for name in KEY]
        self.rows = [each for each in self.rows if [each.get(name) for name in KEY] != key]
        self.rows.append(new)
        if self.path is not None:
            write_json(self.path, {"format": FORMAT, "rows": self.rows})


class Measurement:
    """A model that is not attached between passes, its indexers, and what was asked for."""

    def __init__(self, given: argparse.Namespace) -> None:
        scaling = scaling_wanted(given.rope_scaling, given.indexers)
        self.given = given
        self.loaded: LoadedModel = load_model(given.model, device=given.device, rope_scaling=scaling)
        _, source = attach_indexers(self.loaded, given.indexers)
        self.model = self.loaded.model
        self.taken: Attachment = take_off(self.model)
        self.indexers = digest(
            [state[name] for _, state in sorted(self.taken.weights.items()) for name in sorted(state)]
        )
        common = {"model": given.model, "indexers": f"{source} {self.indexers}", "rope_scaling": given.rope_scaling}
        self.results = Results(given.json, common)
        self.documents = [Document(*_document(name)) for name in given.files]

    def budget(self, top_k: int) -> dict[str, Any]:
        return budget(self.taken.config, top_k, self.given.local, self.given.dense_layers)


def _document(name: str) -> tuple[str, str]:
    """Text and short name."""
    document = read_document(None if name == "demo" else name)
    return document.text, name if name == "demo" else Path(name).stem


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """A short name for exactly these numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


class Perplexity(Measurement):
    """Losses of every text with every reader at every budget."""

    def run(self) -> None:
        given = self.given
        texts = [encode(each, self.loaded.tokenizer, given.tokens, argument="FILES") for each in self.documents]
        dense = [self.losses(number, ids, "dense", {})[0] for number, ids in enumerate(texts)]
        for top_k in given.top_k:
            by_reader = {}
            for reader in given.selections:
                found = []
                for number, ids in enumerate(texts):
                    losses, seconds, config = self.losses(number, ids, reader, self.budget(top_k))
                    found.append(losses)
                    self.row(reader, config, [number], [losses], [dense[number]], seconds)
                by_reader[reader] = found
                if len(texts) > 1:
                    self.row(reader, config, range(len(texts)), found, dense, None)
            for reader in [each for each in by_reader if "dsa" in by_reader and each != "dsa"]:
                for number in range(len(texts)):
                    pair = [by_reader["dsa"][number]], [by_reader[reader][number]]
                    self.row(reader, config, [number], *pair, None, against=True)
                if len(texts) > 1:
                    self.row(reader, config, range(len(texts)), by_reader["dsa"], by_reader[reader], None, against=True)

    def row(
        self,
        reader: str,
        config: DSAConfig,
        texts: Sequence[int],
        ours: list[torch.Tensor],
        theirs: list[torch.Tensor],
        seconds: float | None,
        against: bool = False,
    ) -> None:
        """One ratio: `reader` to dense attention, or DSA to `reader`."""
        found: PerplexityRatio = perplexity_ratio(ours, theirs)
        names = [self.documents[number].name for number in texts]
        name = names[0] if len(names) == 1 else ALL_TEXTS
        what = f"dsa / {reader}" if against else f"{reader} / dense"
        verdict = f"  {reader} is worse" if against and found.high < 1 else ""
        took = "" if seconds is None else f"  {seconds:.1f} s"
        line = f"K {config.top_k:>5}  {name:<36}{what:<16}{found.ratio:.4f} ({found.low:.4f} to {found.high:.4f})"
        self.results.add(
            line + verdict + took,
            row="difference" if against else "perplexity",
            text=name,
            texts=names,
            tokens=self.given.tokens,
            start=self.given.start,
            reader=reader,
            config=config.to_dict(),
            ratio=found.ratio,
            low=found.low,
            high=found.high,
            compared_tokens=found.tokens,
            perplexity=float(torch.cat(ours).mean().exp()),
            perplexity_of_the_other=float(torch.cat(theirs).mean().exp()),
            seconds=seconds,
        )

    def losses(
        self, number: int, ids: torch.Tensor, reader: str, overrides: dict[str, Any]
    ) -> tuple[torch.Tensor, float | None, DSAConfig]:
        """Of one pass, its seconds, and the configuration; seconds are `None` where `--losses` had it already."""
        given = self.given
        with attached(self.model, self.taken, overrides) as config:
            file = None
            if given.losses is not None:
                settings = [given.model, given.rope_scaling, given.start, digest([ids]), reader]
                if reader != "dense":
                    settings += [config.to_dict(), self.indexers if reader == "dsa" else None]
                name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
                file = given.losses / f"{self.documents[number].name}-{reader}-{config.top_k}-{name}.safetensors"
                if file.exists():
                    return load_file(file)["losses"], None, config
            began = time.perf_counter()
            losses = text_losses(self.model, ids, given.start, contexts(reader, config, given.seed))
            seconds = time.perf_counter() - began
            if file is not None:
                given.losses.mkdir(parents=True, exist_ok=True)
                save_file({"losses": losses}, file)
        if reader == "dense":
            perplexity = float(losses.mean().exp())
            print(
                f"{'':<9}{self.documents[number].name:<36}dense perplexity {perplexity:.3f}  {seconds:.1f} s",
                flush=True,
            )
        return losses, seconds, config


class Mass(Measurement):
    """Share of the dense model's attention that the indexers keep, compared with the best that a budget can."""

    def run(self) -> None:
        given = self.given
        texts = [encode(each, self.loaded.tokenizer, given.tokens, argument="FILES") for each in self.documents]
        for top_k in given.top_k:
            rows: list[list[LayerMass]] = []
            for document, ids in zip(self.documents, texts, strict=True):
                began = time.perf_counter()
                with attached(self.model, self.taken, self.budget(top_k)) as config, torch.no_grad():
                    observer = MassObserver(config, given.start)
                    context = DSAContext(mode="dense", observer=observer)
                    self.model(ids.to(self.model.device), use_cache=False, logits_to_keep=1, dsa_context=context)
                rows.append(observer.layers)
                self.row(document.name, [document.name], [observer.layers], config, time.perf_counter() - began)
            if len(texts) > 1:
                self.row(ALL_TEXTS, [each.name for each in self.documents], rows, config, None)

    def row(
        self, name: str, names: list[str], texts: list[list[LayerMass]], config: DSAConfig, seconds: float | None
    ) -> None:
        layers = []
        for of_layer in zip(*texts, strict=True):
            sums = {
                field: sum(getattr(each, field) for each in of_layer) for field in ("dsa", "window", "oracle", "recall")
            }
            means = {field: value / len(of_layer) for field, value in sums.items()}
            layers.append({"layer": of_layer[0].layer, **means, "dsa_over_oracle": sums["dsa"] / sums["oracle"]})
        lowest = min(layers, key=lambda each: each["dsa_over_oracle"])
        mean = sum(each["dsa_over_oracle"] for each in layers) / len(layers)
        took = "" if seconds is None else f"  {seconds:.1f} s"
        self.results.add(
            f"K {config.top_k:>5}  {name:<36}mass kept over the oracle's: mean of {len(layers)} layers {mean:.4f}, "
            f"lowest {lowest['dsa_over_oracle']:.4f} in layer {lowest['layer']}{took}",
            row="mass",
            text=name,
            texts=names,
            tokens=self.given.tokens,
            start=self.given.start,
            config=config.to_dict(),
            dsa_over_oracle_mean=mean,
            dsa_over_oracle_lowest=lowest["dsa_over_oracle"],
            lowest_layer=lowest["layer"],
            layers=layers,
            seconds=seconds,
        )


class Needles(Measurement):
    """Facts planted in the texts and asked for."""

    def run(self) -> None:
        given = self.given
        tokenizer = self.loaded.tokenizer
        texts = [tokenizer(each.text, add_special_tokens=False, verbose=False)["input_ids"] for each in self.documents]
        for length in given.lengths:
            replies: list[dict[str, Any]] = []
            with attached(self.model, self.taken, self.budget(given.top_k[0])) as config:
                began = time.perf_counter()
                for number in range(given.haystacks):
                    hay = make_haystack(texts[number % len(texts)], tokenizer, length, given.seed + number)
                    by_reader = {}
                    for reader in ("dense", *given.selections):
                        by_reader[reader] = ask(self.model, hay, contexts(reader, config, given.seed))
                    replies.append(by_reader)
                    shares = (f"{name} {sum(each.found for each in found)}" for name, found in by_reader.items())
                    seconds = time.perf_counter() - began
                    print(
                        f"  {length:,} tokens, haystack {number + 1}: found {', '.join(shares)}  {seconds:.0f} s",
                        flush=True,
                    )
                for reader in given.selections:
                    self.rows(length, config, replies, reader, time.perf_counter() - began)

    def rows(self, length: int, config: DSAConfig, replies: list[dict[str, Any]], reader: str, seconds: float) -> None:
        found = cells(length, replies, reader)
        lines = []
        for cell in found:
            where = "all depths" if cell.depth is None else f"{10 * cell.depth}-{10 * cell.depth + 10} %"
            difference = "nothing to compare"
            if cell.difference is not None:
                half = "" if cell.half_width is None else f" ± {cell.half_width:.3f}"
                difference = f"{cell.difference:+.3f}{half} nats over {cell.compared}"
            lines.append(
                f"K {config.top_k:>5}  {length:>6,}  {where:<11}{reader} - dense {difference:<36}"
                f"found {reader} {cell.found:.2f}, dense {cell.found_dense:.2f} of {cell.asked}"
                f"{'  LOWER' if cell.is_lower else ''}"
            )
        self.results.add(
            "\n".join(lines),
            row="needles",
            texts=[each.name for each in self.documents],
            length=length,
            seed=self.given.seed,
            reader=reader,
            config=config.to_dict(),
            haystacks=len(replies),
            cells=[{**asdict(cell), "is_lower": cell.is_lower} for cell in found],
            cells_lower=sum(cell.is_lower for cell in found if cell.depth is not None),
            replies=[
                {name: [asdict(reply) for reply in by_reader[name]] for name in ("dense", reader)}
                for by_reader in replies
            ],
            seconds=seconds,
        )


def parser() -> argparse.ArgumentParser:
    """All options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(required=True, metavar="{perplexity,mass,needles}")

    def command(name: str, measurement: type[Measurement], about: str, top_k: list[int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(measurement=measurement)
        made.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 texts, or demo")
        made.add_argument("--model", default="default")
        made.add_argument("--indexers", help="as in `dsa eval`; by default those shipped with the model")
        made.add_argument("--top-k", type=int, nargs="+" if len(top_k) > 1 or name == "mass" else 1, default=top_k)
        made.add_argument("--local", type=int, help="by default the indexers' own, at most half of K")
        made.add_argument("--dense-layers", type=_numbers, metavar="0,7,18", help="in place of the indexers' own")
        made.add_argument("--rope-scaling", help="for texts beyond the model's positions: yarn:4")
        made.add_argument("--device")
        made.add_argument("--seed", type=int, default=0)
        made.add_argument("--json", type=Path, help="results file; its other rows stay")
        return made

    perplexity = command(
        "perplexity", Perplexity, "perplexity against dense, per text and over all", [2048, 1024, 512, 256]
    )
    mass = command("mass", Mass, "attention kept over what the best selection keeps, per layer", [1024])
    for each in (perplexity, mass):
        each.add_argument("--tokens", type=int, default=8192)
        each.add_argument("--start", type=int, help="first position that counts; by default half of the tokens")
    perplexity.add_argument("--losses", type=Path, metavar="DIR", help="keep and reuse the losses of every pass")
    needles = command("needles", Needles, "facts planted in the texts, by length and depth", [1024])
    needles.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    needles.add_argument("--haystacks", type=int, default=12, help="for each length; the texts take turns")
    for each, default in ((perplexity, ["dsa", "window", "blocks"]), (needles, ["dsa"])):
        each.add_argument("--selections", nargs="+", choices=READERS[1:], default=default)
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    given = parser().parse_args()
    if getattr(given, "tokens", None) is not None and given.start is None:
        given.start = given.tokens // 2
    try:
        given.measurement(given).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
