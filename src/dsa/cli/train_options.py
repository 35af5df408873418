"""The options of `dsa train` that no settings class of `dsa.train` has, and what belongs to which stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from dsa.cli import options
from dsa.cli.checks import at_most
from dsa.cli.commands import build, flag
from dsa.cli.configuration import read_config
from dsa.train.settings import DenseSettings, SparseSettings, WarmupSettings

Stage = Literal["warmup", "sparse", "dense"]
Settings: TypeAlias = WarmupSettings | SparseSettings | DenseSettings

STAGES: dict[str, type[Settings]] = {"warmup": WarmupSettings, "sparse": SparseSettings, "dense": DenseSettings}

SCRATCH_LR = 1e-3
"""Default peak learning rate of random weights."""

PANELS = {
    "": (
        *("model", "steps", "out", "stage", "resume", "config", "checkpoint_every", "shard", "tensorboard", "json"),
        *("dtype", "rope_scaling", "device", "threads"),
    ),
    "Data": (
        *("data", "seq_len", "column", "max_tokens", "boundaries", "holdout", "holdout_every", "holdout_sequences"),
    ),
    "Learning": (
        *("lr", "warmup_steps", "schedule", "decay_steps", "max_grad_norm", "sequences", "queries_per_update"),
        *("updates_per_sequence", "target", "start", "seed"),
    ),
    "Sparse stage": ("lora", "lora_alpha", "merge", "all_parameters", "indexer_lr", "distill"),
    "Dense and sparse stage": ("parameters", "mixed_precision", "gradient_checkpointing"),
    "Dense stage": ("from_scratch", "expert_bias_rate"),
    "Indexers": (
        *("indexers", "top_k", "local", "sinks", "index_heads", "index_head_dim", "index_rope_dim"),
        *("selections", "dense_layers"),
    ),
}
"""The panels of the help."""

METAVARS = {"seq_len": "L", "queries_per_update": "Q", "updates_per_sequence": "U", "lora": "RANK", "distill": "W"}
METAVARS["parameters"] = "PATTERN"


def take_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a file the defaults of this call."""
    if path is not None:
        known = [parameter.name for parameter in ctx.command.params if parameter.name]
        lists = {str(each.name) for each in ctx.command.params if getattr(each, "multiple", False)}
        ctx.default_map = read_config(path, known, lists)
    return path


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run is run, whatever its stage."""

    model: options.Model
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, new or empty.", show_default=False)]
    stage: Annotated[
        Stage,
        typer.Option(
            help="`warmup` trains indexers of a frozen model; `sparse` trains the model and its indexers with the "
            "selection on; `dense` trains a model without indexers, with full attention."
        ),
    ] = "warmup"
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=take_config,
            help="YAML with the same names as these options, which win over it. A run writes its own as run.yaml.",
        ),
    ] = None
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Peak learning rate: of the indexers in the warm-up, by default 0.01; else of the model, by default "
            "1e-4 for --lora, 1e-3 for --from-scratch, else 1e-5",
        ),
    ] = None
    sequences: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sequences per step, shared by all processes; by default one each"),
    ] = None
    checkpoint_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")] = 50
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Several processes share out the model's weights among them (FSDP2): for models that one device does "
            "not hold.",
        ),
    ] = False
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write scalars for TensorBoard to DIR/tensorboard.")
    ] = False
    json: options.Json = None
    merge: Annotated[bool, typer.Option("--merge", help="Write the model with the adapters in it, too.")] = False
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="Begin with random weights (--seed): MODEL needs only its config.json and its tokenizer.",
        ),
    ] = False
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Precision of the model's weights; by default float32 on a CPU or for training them, else the "
            "checkpoint's own"
        ),
    ] = None
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:X",
            help="For sequences longer than the model's positions: `yarn:4`, `linear:2`, or JSON as transformers takes "
            "it; saved with the indexers. By default that of --indexers",
        ),
    ] = None
    device: options.Device = None
    threads: options.Threads = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read."""

    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILES...",
            help="UTF-8 text files, one document each; .jsonl or .parquet files, one a row; token files "
            "(.safetensors); or hub:OWNER/NAME[:CONFIG[:SPLIT]].",
            show_default=False,
        ),
    ]
    column: Annotated[str, typer.Option(metavar="NAME", help="Column of rows that holds the text.")] = "text"
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Read at most about N tokens of --data; by default all of files, and of the Hub what the run uses.",
        ),
    ] = None
    holdout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES...",
            help="Text to measure now and then: perplexity against dense, mass kept and recall by layer.",
            show_default=False,
        ),
    ] = None
    holdout_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps between that; by default a tenth of all")
    ] = None
    holdout_sequences: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences of it.")] = 2


@dataclass(frozen=True, kw_only=True)
class IndexerOptions:
    """Which indexers a run begins with."""

    indexers: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Start from these: a file or the folder of a run. Their sizes and dense layers hold.",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="K",
            callback=at_most("--top-k", options.MOST_TOKENS),
            help="Tokens each query reads; of new indexers by default a quarter of --seq-len, 2048 at most",
        ),
    ] = None
    local: options.Local = None
    sinks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many of the K are always the first tokens; by default 4, with latent attention 0",
        ),
    ] = None
    index_heads: Annotated[
        int | None, typer.Option(metavar="N", help="Indexer heads; by default 4, with latent attention 64")
    ] = None
    index_head_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Indexer head size; by default 32, with latent attention 128")
    ] = None
    index_rope_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Dims of a head that carry RoPE; by default a quarter, with latent attention the model's",
        ),
    ] = None
    selections: Annotated[
        str | None,
        typer.Option(
            metavar="N|kv",
            help="Selections of each query: `1` for all heads, `kv` for one for each KV head, or a divisor of the KV "
            "heads; by default 1",
        ),
    ] = None
    dense_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Layers that keep full attention: `0,1,5-7`, or `none`; by default 0, with latent attention none",
        ),
    ] = None


def settings_of(given: Mapping[str, Any], processes: int) -> Settings:
    """The settings of the stage, made from the values of the command's options."""
    kind = STAGES[given["stage"]]
    values = {**given, "sequences": given["sequences"] or processes}
    if values["lr"] is None and kind is not SparseSettings:
        if values["from_scratch"]:
            values["lr"] = SCRATCH_LR
        else:
            del values["lr"]
    return build(kind, values)


def stages_of(name: str) -> list[str]:
    """The stages in which an option means something."""
    if name in {each.name for each in dataclasses.fields(IndexerOptions)}:
        return ["warmup", "sparse"]
    own = {"merge": ["sparse"], "from_scratch": ["dense"]}
    return own.get(name) or [stage for stage, kind in STAGES.items() if name in kind.__dataclass_fields__]


def refuse_other_stages(ctx: typer.Context, stage: str) -> None:
    """Options that the stage would silently ignore end the command.

    Raises:
        ValueError: There is one.
    """
    for parameter in ctx.command.params:
        name = str(parameter.name)
        stages = stages_of(name)
        if stages and stage not in stages and ctx.params[name] != parameter.default:
            raise ValueError(
                f"{flag(name)} belongs to the {' and '.join(stages)} stage; add --stage {stages[0]}, or leave it out"
            )
