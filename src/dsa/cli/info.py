"""`dsa info`: what runs here, and why."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import out, print_json

NOT_THERE = "has no such implementation"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "info", info, short_help="What runs on this machine, and why.")


def info(
    models: Annotated[
        bool, typer.Option("--models", help="List transformers' causal language models: what works, what not and why.")
    ] = False,
    json: options.PrintJson = False,
) -> None:
    """Show what runs on this machine, and why: versions, devices, implementations, the default model."""
    if models:
        _list_models(json)
        return
    import torch
    import transformers

    from dsa import __version__
    from dsa.models.default_model import cache_dir
    from dsa.ops import vendor_support
    from dsa.runs.machine import cpu_name

    rows = {
        "dsa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        "cpu kernels": _kernels(),
        "weights": _weights(),
        "cuda": _cuda(),
        **{name: vendor_support.found(name) for name in vendor_support.FUNCTIONS},
        "default model": _default_model(),
        "its indexers": _shipped_indexers(),
        "cache": f"{cache_dir()} (set DSA_CACHE to change it)",
    }
    ways = implementations()
    if json:
        print_json({"machine": rows, "operations": ways.cells, "reasons": ways.reasons})
        return
    for name, value in rows.items():
        out.print(f"[bold]{name:<14}[/]", end="")
        out.print(value, markup=False, soft_wrap=True)
    out.print()
    show_implementations(ways)


@dataclass(frozen=True)
class Implementations:
    """What runs of each operation.

    Args:
        cells: `runs`, `runs, auto` (it is taken by default), `no` or `-` (there is none), by operation and name.
        reasons: Why others do not run.
    """

    cells: dict[str, dict[str, str]]
    reasons: list[str]


STYLES = {"-": "dim", "no": "yellow"}


def show_implementations(ways: Implementations) -> None:
    """Prints them as a table, then the reasons."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    for heading in ("operation", *next(iter(ways.cells.values()))):
        table.add_column(heading)
    for operation, cells in ways.cells.items():
        shown = (f"[{STYLES.get(cell, 'green')}]{cell}[/]" for cell in cells.values())
        table.add_row(operation, *shown)
    out.print(table)
    for reason in ways.reasons:
        out.print(reason, markup=False, soft_wrap=True)


def _list_models(json: bool) -> None:
    import transformers
    from rich.table import Table

    from dsa.models.listing import causal_models

    listed = causal_models()
    if json:
        print_json({"transformers": transformers.__version__, "models": [each._asdict() for each in listed]})
        return
    working = sum(each.works for each in listed)
    out.print(f"{working} of the {len(listed)} causal language models of transformers {transformers.__version__} work")
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    for each in sorted(listed, key=lambda each: not each.works):
        table.add_row(each.model_type, f"[green]{each.state}[/]" if each.works else each.state, each.note)
    out.print(table)


def implementations() -> Implementations:
    """Which implementation of each operation runs here, which one `auto` takes, and why others do not run.

    Every one is called by name on a tiny input: an explicit choice never falls back, it says what it lacks.
    """
    import torch

    from dsa.ops.triton_support import by_default
    from dsa.ops.types import Impl

    names = [name for name in get_args(Impl) if name != "auto"]
    rows: dict[str, dict[str, str]] = {}
    reasons: dict[str, None] = {}
    fast_first = torch.cuda.is_available() and by_default()
    preferred = ("native", "triton", "reference") if fast_first else ("native", "reference")
    for operation, call in _probes().items():
        cells = rows[operation] = {}
        for name in names:
            try:
                call(name)
                cells[name] = "runs"
            except NotImplementedError as error:
                absent = NOT_THERE in str(error)
                cells[name] = "-" if absent else "no"
                reasons["-  not in this version" if absent else str(error)] = None
        cells[next(name for name in preferred if cells[name] == "runs")] = "runs, auto"
    return Implementations(rows, list(reasons))


def _probes() -> dict[str, Callable[[str], Any]]:
    """A call per operation that has implementations to choose from: one token, the sizes of the default model."""
    import torch

    from dsa import ops

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        index_query, index_key, weight = torch.ones(1, 1, 4, 32), torch.ones(1, 1, 32), torch.ones(1, 1, 4)
        query, key = torch.ones(1, 1, 9, 64), torch.ones(1, 1, 3, 64)
        first = torch.zeros(1, 1, 1, dtype=torch.int32)
        hidden = torch.ones(1, 1, 576)
        shapes = ((128, 576), (32, 576), (4, 576), (32,), (32,))
        latents = torch.ones(1, 1, 576)
        indexer = ops.IndexWeights(*(torch.ones(shape) for shape in shapes))
        packed = ops.pack_weight(torch.ones(16, 576), "Q8_0")
    return {
        "index_projection": lambda impl: ops.index_projection(hidden, indexer, None, index_key.clone(), impl=impl),
        "quantize_index_keys": lambda impl: ops.quantize_index_keys(index_key, impl=impl),
        "pack_latents": lambda impl: ops.pack_latents(latents, impl=impl),
        "index_topk": lambda impl: ops.index_topk(index_query, index_key, weight, 1, impl=impl),
        "sparse_attention": lambda impl: ops.sparse_attention(query, key, key, first, impl=impl),
        "dense_attention": lambda impl: ops.dense_attention(query, key, key, impl=impl),
        "indexer_loss": lambda impl: ops.indexer_loss(index_query, index_key, weight, query, key, impl=impl),
        "packed_linear": lambda impl: ops.packed_linear(hidden, packed, impl=impl),
    }


def _kernels() -> str:
    from dsa.ops import native_support

    with warnings.catch_warnings():
        # What it warns of is what this line says.
        warnings.simplefilter("ignore")
        reason = native_support.missing()
    if reason is not None:
        return f"no: {reason}. To have them, {native_support.HOW_TO_BUILD}"
    others = [name for name in native_support.isas() if name != native_support.isa()]
    choice = f" (DSA_ISA also takes {', '.join(others)})" if others else ""
    return f"{native_support.isa()}{choice}, on as many threads as torch"


def _weights() -> str:
    """What `--weights auto` takes."""
    from dsa.models.packing import has_bf16, why_auto

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = why_auto()
    slow = "" if has_bf16() else "; bf16 has no instructions here"
    return f"auto keeps what is stored: {reason}{slow}"


def _cuda() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return ", ".join(names)
    if torch.version.cuda is None:
        return "no: this torch is built without CUDA"
    return f"no: torch is built for CUDA {torch.version.cuda}, but finds no device"


def _default_model() -> str:
    from dsa.models.default_model import default_gguf, is_converted

    try:
        gguf = default_gguf()
    except ImportError as error:
        return f"no: {error}"
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if is_converted():
        return f"{gguf.stem}, converted"
    if missing:
        return f"{gguf.stem}, but reading it needs {' and '.join(missing)}: pip install 'dsa-attention[gguf]'"
    return f"{gguf.stem}, to be converted at its first use (about 20 s)"


def _shipped_indexers() -> str:
    from dsa.models.checkpoint import SHIPPED, read_indexers

    if not SHIPPED.exists():
        return "no: this installation has no trained indexers"
    stored = read_indexers("default")
    config, layers = stored.config, range(stored.base_model["num_hidden_layers"])
    budgets = sorted({config.layer_top_k(layer) for layer in layers if not config.is_dense(layer)}) or [config.top_k]
    said = f"{config.index_heads} heads of {config.index_head_dim}, top_k {budgets[0]}"
    if len(budgets) > 1:
        said += f" to {budgets[-1]}"
    kinds = {
        "dense": sum(config.is_dense(layer) for layer in layers),
        "sharing": sum(config.shared_with(layer) is not None for layer in layers),
    }
    return said + "".join(f", {count} layer{'s' * (count > 1)} {kind}" for kind, count in kinds.items() if count)
