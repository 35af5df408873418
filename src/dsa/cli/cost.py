"""`dsa cost`: what attention, or a whole model, computes and moves, dense and sparse, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.commands import add_command, flag
from dsa.cli.console import note, out

if TYPE_CHECKING:
    from dsa.config import DSAConfig
    from dsa.cost import ModelShape

DECODED = 256

OF_A_MODEL = (
    *("share", "indexers", "plot", "price", "measured", "prefill_speed", "decode_speed", "index_heads"),
    *("index_head_dim", "index_dtype", "cache"),
)
"""Options that mean nothing without --model."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "cost", cost, short_help="Count what a model computes over a document, dense and sparse.")


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What is counted, and how."""

    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Length of the document or prompt.", show_default=False)
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", help="Tokens each query reads; by default the model's own, or 2048."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="Preset, config.json, directory, `default` or Hub id; without it only pairs are counted."
        ),
    ] = None
    decoded: Annotated[int, typer.Option(metavar="N", help="Tokens decoded after the prompt.")] = DECODED
    share: Annotated[
        int | None, typer.Option(metavar="N", help="Every first of N selecting layers selects for the others.")
    ] = None
    indexers: Annotated[str | None, typer.Option(metavar="PATH", help="Count the DSA saved with these indexers.")] = (
        None
    )
    index_heads: Annotated[int | None, typer.Option(metavar="N", help="Heads of the indexer.")] = None
    index_head_dim: Annotated[int | None, typer.Option(metavar="N", help="Size of an indexer's head.")] = None
    index_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Index keys: `int8`, `fp8` or `fp32`; by default the configuration's, int8 where it has none.",
        ),
    ] = None
    weight_bytes: Annotated[float, typer.Option(metavar="X", help="Bytes of one weight.")] = 2.0
    cache_bytes: Annotated[float, typer.Option(metavar="X", help="Bytes of one number of K and V.")] = 2.0
    cache: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="`fp8` counts latents as FP8 rows, 656 bytes a token in DeepSeek's sizes."),
    ] = None
    price: Annotated[float | None, typer.Option(metavar="X", help="Of one device for one hour.")] = None
    prefill_speed: Annotated[
        str | None, typer.Option(metavar="DENSE,DSA", help="Tokens a second and device, for --price.")
    ] = None
    decode_speed: Annotated[str | None, typer.Option(metavar="DENSE,DSA", help="The same of decoded tokens.")] = None
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Speeds from `dsa bench e2e --json FILE` for --price.")
    ] = None
    published: Annotated[
        bool, typer.Option("--published", help="Predict DeepSeek's published cost curve, V3.1 to V3.2.")
    ] = False
    positions: Annotated[
        int, typer.Option(metavar="N", help="With --published: positions that a decoding step computes.")
    ] = 2
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw cost over length: .svg, .png or .pdf.")] = None
    json: options.Json = None


def cost(options: CostOptions) -> None:
    """Count what a model computes and moves over a document, dense and with DSA.

    Without a model: the pairs of tokens of one head in one layer. Counted causally, as language models read, dense
    attention computes half of the square, so that the reduction is about half as large. The indexer's own scores come
    on top: cheap pairs, but as many as dense attention has.

    With a model: multiply-adds and bytes of every part, for a decoded token, a prompt and a request, memory, and the
    length from which on DSA needs less. Nothing is loaded but the configuration.

    [bold]Examples[/]

      dsa cost --tokens 100000 --top-k 1000
      dsa cost --model Qwen3-8B --tokens 131072 --share 4
      dsa cost --model DeepSeek-V3.2 --tokens 131072 --cache fp8 --index-dtype fp8 --json cost.json
      dsa cost --model ./my-model/config.json --tokens 32768 --plot cost.svg
      dsa cost --model default --tokens 32768 --price 0.5 --measured e2e.json
      dsa cost --published
    """
    from dsa.runs.files import check_writable, write_json
    from dsa.runs.plots import check_plot

    if options.json is not None:
        check_writable(options.json)
    if options.plot is not None:
        check_writable(options.plot, "plot")
        check_plot(options.plot)
    if options.published:
        _refuse(
            options,
            ("model", "tokens", "top_k", "price", "plot"),
            "does nothing with --published, whose models, lengths and prices are the report's",
        )
        figures = _published(options.positions)
    elif options.model is None:
        _refuse(options, OF_A_MODEL, "needs a model: add --model")
        figures = _pairs(_given("tokens", options.tokens), _given("top_k", options.top_k))
    else:
        from dsa.cost import Storage, config_for, model_report, read_model

        shape, own = read_model(options.model, saved_config)
        own = own if options.indexers is None else saved_config(options.indexers)
        config = config_for(
            shape,
            own,
            top_k=options.top_k,
            share=options.share,
            index_heads=options.index_heads,
            index_head_dim=options.index_head_dim,
            index_dtype=options.index_dtype,
        )
        storage = Storage(options.weight_bytes, options.cache_bytes, fp8_rows=_fp8_rows(shape, options.cache))
        length = _given("tokens", options.tokens)
        figures = model_report(shape, config, length, options.decoded, storage)
        money = _money(options, length)
        if money is not None:
            figures["money"] = money
        _show_model(shape, config, own, figures)
        if options.plot is not None:
            from dsa.cost.plot import draw_costs

            draw_costs(shape, config, length, options.plot, storage)
            out.print(f"Drawn: {options.plot}", markup=False, soft_wrap=True)
    if options.json is not None:
        write_json(options.json, figures)
        out.print(f"Figures written to {options.json}", markup=False, soft_wrap=True)


def saved_config(indexers: str | Path) -> DSAConfig:
    """The configuration in a file of indexers, as `dsa.attach` takes it.

    Raises:
        ValueError: Not an indexer file, truncated or corrupt.
        OSError: Nothing is there.
    """
    from dsa.models.checkpoint import read_indexers

    return read_indexers(indexers).config


def _fp8_rows(shape: ModelShape, cache: str | None) -> bool:
    """Whether latents are counted as FP8 rows. Raises `ValueError` for another kind, or a model without latents."""
    from dsa.cost.shape import LatentAttention

    if cache not in (None, "full", "fp8"):
        raise ValueError(f"cache must be full or fp8, got {cache!r}")
    if cache == "fp8" and not any(isinstance(layer.attention, LatentAttention) for layer in shape.layers):
        raise ValueError(
            f"cache: FP8 rows hold latents, and {shape.name} caches keys and values; leave --cache out, or give "
            "--cache-bytes"
        )
    return cache == "fp8"


def _given(name: str, value: int | None) -> int:
    if value is None:
        raise ValueError(f"{name}: expected a number of tokens; add {flag(name)} N")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _refuse(options: CostOptions, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: {flag(name)} {why}")


def _pairs(tokens: int, top_k: int) -> dict[str, Any]:
    from dsa.cli.cost_table import show_pairs
    from dsa.cost import Pairs

    pairs = Pairs(tokens, top_k)
    if top_k >= tokens:
        note(f"K = {top_k:,} is not below the document's {tokens:,} tokens: DSA leaves nothing out and is dense here.")
    show_pairs(pairs)
    return pairs.to_json()


def _published(positions: int) -> dict[str, Any]:
    from dsa.cli.cost_table import show_published
    from dsa.cost.published import Assumptions, Curve

    figures = Curve(Assumptions(positions_a_step=positions)).to_json([2048, 8192, 32768, 65536, 131072])
    show_published(figures)
    return figures


def _money(options: CostOptions, tokens: int) -> dict[str, Any] | None:
    from dsa.cost.money import Speeds, measured_speeds, parse_speeds, prices

    price, measured = options.price, options.measured
    if price is None:
        _refuse(
            options,
            ("prefill_speed", "decode_speed", "measured"),
            "needs a price: add --price X, of one device for one hour",
        )
        return None
    speeds: dict[str, Speeds] = {}
    lengths = {}
    if measured is not None:
        for phase, each in measured_speeds(measured, tokens).items():
            speeds[phase], lengths[phase] = each.speeds, each.tokens
            if each.tokens != tokens:
                note(f"{measured} has no {phase} of {tokens:,} tokens; its speeds are those at {each.tokens:,}.")
    for phase, text in (("prefill", options.prefill_speed), ("decode", options.decode_speed)):
        if text is not None:
            speeds[phase] = parse_speeds(text, f"{phase}_speed")
            lengths.pop(phase, None)
    if not speeds:
        raise ValueError(
            "price: a price needs speeds: add --prefill-speed DENSE,DSA, --decode-speed DENSE,DSA or --measured FILE"
        )
    return {
        "price_per_device_hour": price,
        "measured_at_tokens": lengths,
        **{phase: prices(price, each) for phase, each in speeds.items()},
    }


def _show_model(shape: ModelShape, config: DSAConfig, own: DSAConfig | None, figures: dict[str, Any]) -> None:
    from dsa.cli.cost_table import show_model

    if own is None:
        note(
            f"{shape.name} comes with no DSA: counted are {config.index_heads} index heads of "
            f"{config.index_head_dim} and K = {config.top_k:,}."
        )
    if config.top_k >= figures["tokens"]:
        note(
            f"K = {config.top_k:,} is not below {figures['tokens']:,} tokens: DSA leaves nothing out and is dense here."
        )
    longest = figures["tokens"] + figures["decoded"]
    if shape.positions is not None and longest > shape.positions:
        note(f"{longest:,} tokens are more than the {shape.positions:,} positions that {shape.name} names.")
    show_model(figures)
