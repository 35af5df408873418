"""`dsa calibrate`: how much each layer has to read, by what it costs in quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsa.calibrate.settings import CalibrationSettings
from dsa.cli import options
from dsa.cli.commands import ListCommand, add_command, build
from dsa.cli.console import err, notes, out
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.calibrate.result import Calibration
    from dsa.models.loading import LoadedModel

ORDER = (
    *("model", "data", "mass", "perplexity_ratio", "out_path", "save_model", "indexers", "verify", "tokens", "top_k"),
    *("max_dense", "share", "min_shared", "minimise", "quick", "compare_uniform"),
)
"""The order of the options in the help."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(
        app,
        "calibrate",
        calibrate,
        short_help="Find how much each layer has to read, by quality on your text.",
        cls=ListCommand,
        settings=[CalibrationSettings],
        omit=("budgets", "may_share", "effects"),
        panels={"": ORDER},
    )


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What is read, and where the result goes; the rest are `CalibrationSettings`."""

    model: options.Model
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILES...", help="UTF-8 texts to measure on, each read by itself.", show_default=False),
    ]
    out_path: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the indexers with what was found, for --indexers."),
    ] = None
    save_model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the whole model with indexers, for `from_pretrained`."),
    ] = None
    indexers: options.Indexers = None
    verify: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Judge the result on this text, not on the data. May be repeated."),
    ] = None
    top_k: Annotated[
        str | None,
        typer.Option(
            "--top-k", metavar="LIST", help="Values of K to choose from: `256,512,1024`; by default four per doubling"
        ),
    ] = None
    share: Annotated[bool, typer.Option(help="Layers may read what an earlier layer selected.")] = True
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Let attention mass alone tell which layers need more: no pass for each layer."),
    ] = False
    rope_scaling: options.RopeScaling = None
    json: options.Json = None
    threads: options.Threads = None
    device: options.Device = None
    weights: options.Weights = None


def calibrate(ctx: typer.Context, options: CalibrateOptions) -> None:
    """Find how much each layer has to read: its own K, full attention, or what an earlier layer selected.

    Measures on your text what every layer's selection keeps and, for a perplexity target, what each layer does to the
    predictions; then takes the cheapest arrangement within the target. The model and its indexers stay as they are;
    what was found is saved with them and honoured by generate, eval and `dsa.attach`.

    [bold]Examples[/]

      dsa calibrate default --data a.txt --perplexity-ratio 1.005 --out tuned
      dsa calibrate default --data a.txt b.txt --mass 0.98 --json found.json
      dsa calibrate default --data a.txt --verify b.txt --perplexity-ratio 1.01
      dsa generate default --indexers tuned --file thesis.txt
    """
    asked = {"budgets": parse_budgets(options.top_k), "may_share": options.share, "effects": not options.quick}
    settings = build(CalibrationSettings, {**ctx.params, **asked})
    from dsa.runs.files import check_folder_writable, check_writable, write_json
    from dsa.runs.inputs import read_document

    if options.json is not None:
        check_writable(options.json)
    check_new(options.out_path)
    if options.save_model is not None:
        check_folder_writable(options.save_model, "save-model")
    documents = [read_document(path, "data") for path in options.data]
    others = [read_document(path, "verify") for path in options.verify or []]
    import torch

    from dsa.calibrate.calibration import calibrate as run
    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with notes(), Steps() as steps:
        scaling = scaling_wanted(options.rope_scaling, options.indexers)
        loaded = load_model(
            options.model, device=options.device, status=steps.status, rope_scaling=scaling, weights=options.weights
        )
        found = run(
            loaded,
            documents,
            settings,
            indexers=options.indexers,
            verify=others,
            progress=steps,
            report=lambda message: err.print(message, markup=False, soft_wrap=True),
        )
    if options.json is not None:
        write_json(options.json, found.to_json())
    show(found)
    keep(loaded, options)


def keep(loaded: LoadedModel, options: CalibrateOptions) -> None:
    """Writes the indexers and the model where they were asked for, and prints what was written."""
    if options.out_path is not None:
        from dsa.models import save_indexers

        out.print(f"Indexers written to {save_indexers(loaded.model, options.out_path)}", markup=False, soft_wrap=True)
    if options.save_model is not None:
        from dsa.runs.files import fill_folder

        def save(part: Path) -> None:
            loaded.model.save_pretrained(part)
            loaded.tokenizer.save_pretrained(part)

        fill_folder(options.save_model, save, "save-model")
        out.print(f"Model written to {options.save_model}", markup=False, soft_wrap=True)
    if options.json is not None:
        out.print(f"Figures written to {options.json}", markup=False, soft_wrap=True)
    if options.out_path is None and options.save_model is None:
        out.print("Nothing was saved: --out DIR or --save-model DIR keeps what was found.")


def parse_budgets(text: str | None) -> tuple[int, ...] | None:
    """`"256,512"` as `(256, 512)`.

    Raises:
        ValueError: Anything else.
    """
    if text is None:
        return None
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"top-k must be whole numbers with commas between, like 256,512,1024, got {text!r}")
    return tuple(int(part) for part in parts)


def check_new(path: Path | None) -> None:
    """Refuses to write over indexers: those of layers that share are not in the new file.

    Raises:
        ValueError: There is such a file, or the path is a file of another kind.
        OSError: The folder cannot be written.
    """
    if path is None:
        return
    from dsa.models.checkpoint import FILE_NAME
    from dsa.runs.files import check_folder_writable

    if path.suffix and path.suffix != ".safetensors":
        raise ValueError(f"out: expected a folder or a .safetensors file, got {path}")
    file = path if path.suffix else path / FILE_NAME
    if file.exists():
        raise ValueError(
            f"out: {file} is there already; layers that share lose their indexers, so nothing is overwritten: give a "
            "new folder"
        )
    check_folder_writable(file.parent)


def show(found: Calibration) -> None:
    """Prints the layers, the predicted cost and the perplexity ratio."""
    from rich import box
    from rich.table import Table

    width = min(80, out.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("reads")
    for heading in ("mass kept", "of the best", "effect"):
        table.add_column(heading, justify="right")
    for row in found.layers:
        if row.kind == "dense":
            reads = "everything" if row.has_indexer else "everything: it has no indexer"
        else:
            reads = f"{row.top_k:,} tokens" + ("" if row.share is None else f" that layer {row.share} selects")
        best = "-" if row.kept_of_oracle is None else f"{row.kept_of_oracle:.4f}"
        effect = "-" if row.effect is None else f"{row.effect:.1e}"
        table.add_row(str(row.layer), reads, f"{row.kept:.4f}", best, effect)
    out.print(table, width=width)
    for remark in remarks(found):
        out.print(remark, width=width, markup=False)


def remarks(found: Calibration) -> list[str]:
    """What the table comes to."""
    count, cost, dense = len(found.layers), found.cost, found.dense_cost
    said = [
        f"{found.count('sparse')} layers select, {found.count('shared')} share, {found.count('dense')} are dense. "
        f"A query reads {cost.tokens_read / count:,.0f} tokens a layer, of {dense.tokens_read / count:,.0f}; predicted "
        f"cost of attention and indexers, of dense: {cost.operations / dense.operations:.1%} of the operations, "
        f"{cost.bytes / dense.bytes:.1%} of the bytes of decoding.",
        f"Perplexity ratio to dense: {found.ratio}, {found.ratio.tokens:,} tokens of {', '.join(found.verified_on)}.",
    ]
    target = found.settings.perplexity_ratio
    if target is not None and found.ratio.high - found.ratio.ratio > target - 1:
        said[-1] += " The interval is wider than what was allowed: more text, or longer, tells more."
    if not found.is_verified_elsewhere:
        said[-1] += " It was chosen on this text; --verify FILE judges it on another."
    uniform = found.uniform
    if uniform is not None and uniform.cost is not None:
        said.append(
            f"One K for all layers needs {uniform.top_k:,} for a ratio of {uniform.ratio:.4f}: "
            f"{uniform.cost.tokens_read / count:,.0f} tokens a layer, {uniform.cost.operations / dense.operations:.1%} "
            "of the operations."
        )
    elif uniform is not None:
        said.append(
            f"One K for all layers does not reach this with K up to {found.budgets[-1]:,}; the best is "
            f"{uniform.ratio:.4f}."
        )
    if any(row.effect is not None for row in found.layers):
        said.append(
            "Effect: nats per token by which the model's predictions change when that layer alone is sparse, at "
            f"K = {found.budgets[len(found.budgets) // 4]:,}."
        )
    said.append(f"{found.seconds:.0f} s in all.")
    return said
