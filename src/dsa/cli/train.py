"""`dsa train`: teach a model language, its indexers what its dense attention reads, or the model to live with them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dsa.cli import options
from dsa.cli.configuration import read_config, write_config
from dsa.cli.console import Steps, err
from dsa.cli.training import (
    DENSE,
    MODEL_STAGES,
    SPARSE,
    Dtype,
    LearningRate,
    Precision,
    Stage,
    Start,
    Target,
    attach_existing,
    attach_fresh,
    attach_trained,
    fresh_config,
    heard,
    indexer_options,
    interruptible,
    refuse_native,
    refuse_other_stages,
    run,
    settings_of,
    without_indexers,
)

LISTS = ("data", "holdout")
DATA, SCHEDULE, INDEXERS = "Data", "Learning", "Indexers"


class TrainCommand(TyperCommand):
    """Lets `--data` and `--holdout` take several files at once, as a shell's `*.txt` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option in LISTS:
            args = spread(f"--{option}", args)
        return super().parse_args(ctx, args)


def take_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a file the defaults of this call."""
    if path is not None:
        known = [parameter.name for parameter in ctx.command.params if parameter.name]
        ctx.default_map = read_config(path, known, set(LISTS))
    return path


def spread(option: str, args: list[str]) -> list[str]:
    """`--data a b --data c` as `--data a --data b --data c`: what follows up to the next option belongs to it."""
    result: list[str] = []
    inside = False
    for arg in args:
        if arg.startswith("-") and arg != "-":
            inside = arg == option
            if not inside:
                result.append(arg)
        else:
            result.extend((option, arg) if inside else (arg,))
    if args and args[-1] == option:
        result.append(option)
    return result


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", cls=TrainCommand, short_help="Train a model's indexers on your own text.")(train)


def train(
    ctx: typer.Context,
    model: options.Model,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILES...",
            help="UTF-8 text files, one document each; .jsonl or .parquet files, one a row; token files "
            "(.safetensors); or hub:OWNER/NAME[:CONFIG[:SPLIT]].",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    steps: Annotated[
        int,
        typer.Option(
            metavar="N", help="Steps; each reads --sequences sequences, which train all layers.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, new or empty.", show_default=False)],
    stage: Annotated[
        Stage,
        typer.Option(
            help="`warmup` trains indexers of a frozen model; `sparse` trains the model and its indexers with the "
            "selection on; `dense` trains a model without indexers, with full attention."
        ),
    ] = Stage.warmup,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=take_config,
            help="YAML with the same names as these options, which win over it. A run writes its own as run.yaml.",
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(metavar="L", help="Tokens per sequence.", rich_help_panel=DATA)] = 2048,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of rows that holds the text.", rich_help_panel=DATA)
    ] = "text",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Read at most about N tokens of --data; by default all of files, and of the Hub what the run uses.",
            rich_help_panel=DATA,
        ),
    ] = None,
    boundaries: Annotated[
        bool,
        typer.Option(
            "--boundaries/--no-boundaries",
            help="Tokens attend within their document, or a sequence is one text.",
            rich_help_panel=DATA,
        ),
    ] = True,
    holdout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES...",
            help="Text to measure now and then: perplexity against dense, mass kept and recall by layer.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    holdout_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps between that; by default a tenth of all", rich_help_panel=DATA),
    ] = None,
    holdout_sequences: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sequences of it.", rich_help_panel=DATA)
    ] = 2,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Peak learning rate: of the indexers in the warm-up, by default 0.01; else of the model, by default "
            "1e-4 for --lora, 1e-3 for --from-scratch, else 1e-5",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Steps of linear warm-up; by default a fiftieth of all", rich_help_panel=SCHEDULE
        ),
    ] = None,
    schedule: Annotated[
        LearningRate,
        typer.Option(help="After that: fall to zero, stay and fall at the end, or stay.", rich_help_panel=SCHEDULE),
    ] = LearningRate.cosine,
    decay_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="The end of `wsd`; by default a fifth of all", rich_help_panel=SCHEDULE),
    ] = None,
    max_grad_norm: Annotated[
        float, typer.Option(metavar="X", help="Gradients are clipped to this norm.", rich_help_panel=SCHEDULE)
    ] = 1.0,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Sequences per step, shared by all processes; by default one each",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    queries_per_update: Annotated[
        int | None,
        typer.Option(
            metavar="Q",
            help="Queries of a sequence one optimizer step of a layer learns from; by default 64 (on a GPU try 512), "
            "in the sparse stage all",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    updates_per_sequence: Annotated[
        int | None,
        typer.Option(
            metavar="U",
            help="Optimizer steps per layer and step of the warm-up; by default every query is used about once.",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(
            help="`far` learns what has to be selected; `paper` learns all positions, the always-read too.",
            rich_help_panel=SCHEDULE,
        ),
    ] = Target.far,
    start: Annotated[
        Start,
        typer.Option(
            help="New indexers begin with random weights, or `fitted` in closed form to what each layer attends to in "
            "the first sequence.",
            rich_help_panel=SCHEDULE,
        ),
    ] = Start.random,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Of the first weights and of the order of the data.", rich_help_panel=SCHEDULE),
    ] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")] = 50,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Several processes share out the model's weights among them (FSDP2): for models that one device does "
            "not hold.",
        ),
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write scalars for TensorBoard to DIR/tensorboard.")
    ] = False,
    lora: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="Train low-rank adapters on all linear layers.", rich_help_panel=SPARSE),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="X", help="Their scale times RANK; by default twice RANK", rich_help_panel=SPARSE),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the model with the adapters in it, too.", rich_help_panel=SPARSE)
    ] = False,
    all_parameters: Annotated[
        bool, typer.Option("--all-parameters", help="Train every parameter.", rich_help_panel=SPARSE)
    ] = False,
    parameters: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Train those whose name this regular expression finds.",
            rich_help_panel=MODEL_STAGES,
        ),
    ] = None,
    indexer_lr: Annotated[
        float, typer.Option(metavar="X", help="Peak learning rate of the indexers.", rich_help_panel=SPARSE)
    ] = 1e-3,
    distill: Annotated[
        float,
        typer.Option(
            metavar="W", help="Weight of the divergence from the dense model's predictions.", rich_help_panel=SPARSE
        ),
    ] = 0.0,
    mixed_precision: Annotated[
        Precision, typer.Option(help="Compute in bf16.", rich_help_panel=MODEL_STAGES)
    ] = Precision.no,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory: activations within layers are computed twice.",
            rich_help_panel=MODEL_STAGES,
        ),
    ] = False,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="Begin with random weights (--seed): MODEL needs only its config.json and its tokenizer.",
            rich_help_panel=DENSE,
        ),
    ] = False,
    expert_bias_rate: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="How far a step moves the biases with which routers select experts, towards equal load; 0.001 in "
            "DeepSeek-V3.",
            rich_help_panel=DENSE,
        ),
    ] = 0.0,
    indexers: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Start from these: a file or the folder of a run. Their sizes and dense layers hold.",
            rich_help_panel=INDEXERS,
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Tokens each query reads.", rich_help_panel=INDEXERS)
    ] = None,
    local: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="How many of the K are always the most recent tokens.", rich_help_panel=INDEXERS
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many of the K are always the first tokens; by default 4, with latent attention 0",
            rich_help_panel=INDEXERS,
        ),
    ] = None,
    index_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Indexer heads; by default 4, with latent attention 64", rich_help_panel=INDEXERS
        ),
    ] = None,
    index_head_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Indexer head size; by default 32, with latent attention 128", rich_help_panel=INDEXERS
        ),
    ] = None,
    index_rope_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Dims of a head that carry RoPE; by default a quarter, with latent attention the model's",
            rich_help_panel=INDEXERS,
        ),
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Layers that keep full attention: `0,1,5-7`, or `none`; by default 0, with latent attention none",
            rich_help_panel=INDEXERS,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Precision of the model's weights; by default float32 on a CPU or for training them, else the "
            "checkpoint's own"
        ),
    ] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:X",
            help="For sequences longer than the model's positions: `yarn:4`, `linear:2`, or JSON as transformers takes "
            "it; saved with the indexers. By default that of --indexers",
        ),
    ] = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Train a model's indexers to predict its own attention, a model to live with its indexers, or a model as such.

    The warm-up leaves the model as it is: it reads with full attention, and all layers' indexers learn from that,
    several updates a step. The sparse stage reads with the selection: the parameters you choose learn from language
    modelling, the indexers from the attention over what they selected. The dense stage comes before both: a model
    without indexers learns language modelling with full attention, from random weights or trained on.

    DIR gets indexers.safetensors (for --indexers and `dsa.attach`), log.jsonl, state.safetensors (for --resume), and
    in the sparse stage `adapter` or `model`, in the dense one `model`. A run that was stopped or killed continues with
    the same command and --resume, to the same losses. `torchrun --nproc-per-node N -m dsa train ...` shares each
    step's sequences among N processes, with --shard the model's weights too.

    [bold]Examples[/]

      dsa train default --data text/*.txt --steps 240 --out runs/mine

      dsa train Qwen/Qwen3-0.6B --data books.jsonl --steps 500 --out runs/qwen

      dsa train Qwen/Qwen3-0.6B --data books.jsonl --steps 500 --stage sparse --lora 16 \\
        --indexers runs/qwen --out runs/qwen-sparse

      dsa train configs/small --data books.jsonl --steps 2000 --stage dense --from-scratch --out runs/small

      dsa train --config runs/qwen/run.yaml --out runs/again
    """
    import torch

    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model
    from dsa.train import Holdout, read_data, start_processes

    refuse_other_stages(ctx, stage)
    if start is Start.fitted and indexers is not None:
        raise ValueError("--start fitted sets new indexers; leave it out where training goes on with --indexers")
    processes, own_device = start_processes(device, shard)
    settings = settings_of(ctx.params, processes.size)
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype is None and (all_parameters or parameters is not None or stage is Stage.dense):
        dtype = Dtype.float32
    precision = None if dtype is None else getattr(torch, dtype.value)
    with heard(processes.is_main):
        with Steps() as progress:
            status = progress.status
            scaling = scaling_wanted(rope_scaling, indexers)
            loaded = load_model(
                model,
                dtype=precision,
                device=own_device,
                status=status,
                rope_scaling=scaling,
                place=not processes.shard,
                random_seed=seed if from_scratch else None,
            )
            refuse_native(loaded)
            vocabulary = loaded.model.get_input_embeddings().num_embeddings
            stream = read_data(
                data,
                loaded.tokenizer,
                vocabulary,
                status,
                column=column,
                max_tokens=max_tokens,
                remote_tokens=2 * settings.steps * settings.sequences * seq_len,
            )
            held_out = None
            if holdout:
                enough = 4 * holdout_sequences * seq_len
                other = read_data(holdout, loaded.tokenizer, vocabulary, status, column=column, remote_tokens=enough)
                held_out = Holdout.of(other, seq_len, holdout_sequences, boundaries=boundaries)
        changes = indexer_options(top_k, local, sinks, index_heads, index_head_dim, index_rope_dim, dense_layers)
        if stage is Stage.dense:
            without_indexers(loaded.model)
        elif stage is Stage.sparse:
            attach_trained(loaded, indexers, changes)
        elif indexers is not None:
            attach_existing(loaded.model, indexers, changes)
        else:
            attach_fresh(loaded.model, fresh_config(loaded.model, changes), seed)
        err.print(f"{len(stream):,} tokens of training data", markup=False)
        with interruptible() as interruption:
            result = run(
                loaded,
                stream,
                out,
                settings,
                interruption,
                merge=merge,
                tensorboard=tensorboard,
                checkpoint_every=checkpoint_every,
                resume=resume,
                processes=processes,
                holdout=held_out,
                holdout_every=holdout_every or max(1, steps // 10),
                recipe=write_config(ctx.params),
            )
    if result.step < steps:
        if processes.is_main:
            err.print(f"stopped after step {result.step} of {steps}; continue with the same command and --resume")
        raise typer.Exit(128 + (interruption.signal or signal.SIGINT))
    if not processes.is_main:
        return
    mean = f", mean KL of the last step {sum(result.kl.values()) / len(result.kl):.4f}" if result.kl else ""
    if stage is Stage.dense and result.language is not None:
        mean = f", loss of the last step {result.language:.4f}"
    err.print(f"{steps} steps done{mean}", markup=False)
    for written in (result.indexers, result.model):
        if written is not None:
            typer.echo(written)
