"""`dsa train`: teach a model language, its indexers what its dense attention reads, or the model to live with them."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING, Any

import typer

from dsa.cli.commands import ListCommand, add_command
from dsa.cli.configuration import write_config
from dsa.cli.console import err, only_from
from dsa.cli.interruption import Interruption, interruptible
from dsa.cli.train_indexers import attach_for, refuse_born_with_dsa
from dsa.cli.train_options import (
    METAVARS,
    PANELS,
    STAGES,
    DataOptions,
    IndexerOptions,
    Settings,
    TrainOptions,
    refuse_other_stages,
    settings_of,
)
from dsa.cli.waiting import Steps, animated, drawn_elsewhere
from dsa.train.settings import DenseSettings, SparseSettings, WarmupSettings

if TYPE_CHECKING:
    from dsa.models.loading import LoadedModel
    from dsa.train import Holdout, Processes, Reporter, RunOptions, TokenStream, TrainingResult


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(
        app,
        "train",
        train,
        short_help="Train a model's indexers on your own text.",
        cls=ListCommand,
        settings=list(STAGES.values()),
        panels=PANELS,
        metavars=METAVARS,
    )


def train(ctx: typer.Context, options: TrainOptions, data: DataOptions, indexers: IndexerOptions) -> None:
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

    from dsa.runs.files import check_writable, write_json
    from dsa.train import RunOptions, start_processes
    from dsa.train.data import check_file
    from dsa.train.extras import needed
    from dsa.train.state import RunFolder

    refuse_other_stages(ctx, options.stage)
    if ctx.params["start"] == "fitted" and indexers.indexers is not None:
        raise ValueError("--start fitted sets new indexers; leave it out where training goes on with --indexers")
    processes, device = start_processes(options.device, options.shard)
    settings = settings_of(ctx.params, processes.size)
    if processes.is_main:
        # Before the model and the texts are read, which takes a while.
        if options.tensorboard:
            needed("tensorboard", "writing scalars for TensorBoard")
        folder = RunFolder(options.out)
        folder.check_resumable() if options.resume else folder.check_new()
        for argument, files in (("data", data.data), ("holdout", data.holdout or ())):
            for file in files:
                check_file(file, argument)
        if options.json is not None:
            check_writable(options.json)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with only_from(processes.is_main):
        with Steps() as progress:
            loaded = load(options, indexers, settings, processes, device, progress)
            stream, holdout = read_texts(loaded, data, settings, progress)
        attach_for(loaded, settings, indexers)
        err.print(f"{len(stream):,} tokens of training data", markup=False)
        with interruptible() as interruption:
            run_options = RunOptions(
                checkpoint_every=options.checkpoint_every,
                resume=options.resume,
                should_stop=interruption,
                processes=processes,
                holdout=holdout,
                holdout_every=data.holdout_every or max(1, settings.steps // 10),
                recipe=write_config(ctx.params),
            )
            result = run(loaded, stream, settings, options, run_options)
    if processes.is_main and options.json is not None:
        write_json(options.json, figures(result, loaded, options, settings))
    show_result(result, settings, processes, interruption)


def load(
    options: TrainOptions,
    indexers: IndexerOptions,
    settings: Settings,
    processes: Processes,
    device: str | None,
    progress: Steps,
) -> LoadedModel:
    """Loads the model, or makes it with random weights.

    Raises:
        ValueError: It was born with DSA, or cannot be loaded.
    """
    import torch

    from dsa.models.extension import scaling_wanted
    from dsa.models.loading import load_model

    dtype = options.dtype
    if dtype is None and not isinstance(settings, WarmupSettings) and getattr(settings, "lora", None) is None:
        dtype = "float32"
    loaded = load_model(
        options.model,
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device,
        status=progress.status,
        rope_scaling=scaling_wanted(options.rope_scaling, indexers.indexers),
        place=not processes.shard,
        random_seed=settings.seed if options.from_scratch else None,
    )
    refuse_born_with_dsa(loaded)
    return loaded


def read_texts(
    loaded: LoadedModel, data: DataOptions, settings: Settings, progress: Steps
) -> tuple[TokenStream, Holdout | None]:
    """The training tokens and the held-out ones.

    Raises:
        ValueError: A text cannot be read or is too short.
        OSError: A file cannot be read.
    """
    from dsa.train import Holdout, read_data

    vocabulary = loaded.model.get_input_embeddings().num_embeddings

    def read(files: list[str], remote_tokens: int, max_tokens: int | None = None) -> TokenStream:
        return read_data(
            files,
            loaded.tokenizer,
            vocabulary,
            progress.status,
            column=data.column,
            max_tokens=max_tokens,
            remote_tokens=remote_tokens,
        )

    stream = read(data.data, 2 * settings.steps * settings.sequences * settings.seq_len, data.max_tokens)
    if not data.holdout:
        return stream, None
    held_out = read(data.holdout, 4 * data.holdout_sequences * settings.seq_len)
    return stream, Holdout.of(held_out, settings.seq_len, data.holdout_sequences, boundaries=settings.boundaries)


def run(
    loaded: LoadedModel, stream: TokenStream, settings: Settings, options: TrainOptions, run_options: RunOptions
) -> TrainingResult:
    """Trains with progress on stderr: drawn on a terminal, lines elsewhere."""
    from dsa.train import LineReporter, LiveReporter, Reporters, train_dense, train_indexers, train_sparse
    from dsa.train.tensorboard import TensorBoardReporter

    model, tokenizer, out = loaded.model, loaded.tokenizer, options.out
    is_main = run_options.processes.is_main
    device = run_options.processes.device or model.device
    boards = [TensorBoardReporter(out / "tensorboard", device)] if options.tensorboard and is_main else []

    def train_with(*reporters: Reporter) -> TrainingResult:
        reported = dataclasses.replace(run_options, reporter=Reporters(*reporters, *boards))
        if isinstance(settings, WarmupSettings):
            return train_indexers(model, stream, out, settings, reported)
        if isinstance(settings, SparseSettings):
            return train_sparse(model, stream, out, settings, reported, tokenizer=tokenizer, merge=options.merge)
        return train_dense(model, stream, out, settings, reported, tokenizer=tokenizer)

    if not is_main:
        return train_with()
    if not animated():
        return train_with(LineReporter(err))
    with drawn_elsewhere(), LiveReporter(err) as live:
        return train_with(live)


def figures(result: TrainingResult, loaded: LoadedModel, options: TrainOptions, settings: Settings) -> dict[str, Any]:
    """What the run came to, as `--json` has it; where it was stopped `step` is below `settings.steps`."""
    from dsa.runs.machine import describe_machine

    return {
        "model": options.model,
        "stage": options.stage,
        "step": result.step,
        "kl": {str(layer): value for layer, value in result.kl.items()},
        "language": result.language,
        "indexers": None if result.indexers is None else str(result.indexers),
        "trained_model": None if result.model is None else str(result.model),
        "settings": settings.to_dict(),
        "environment": describe_machine(loaded.model.device),
    }


def show_result(result: TrainingResult, settings: Settings, processes: Processes, interruption: Interruption) -> None:
    """Prints what the run came to, and where it is; ends the command where it was stopped."""
    if result.step < settings.steps:
        if processes.is_main:
            err.print(
                f"stopped after step {result.step} of {settings.steps}; continue with the same command and --resume"
            )
        raise typer.Exit(128 + (interruption.signal or signal.SIGINT))
    if not processes.is_main:
        return
    mean = f", mean KL of the last step {sum(result.kl.values()) / len(result.kl):.4f}" if result.kl else ""
    if isinstance(settings, DenseSettings) and result.language is not None:
        mean = f", loss of the last step {result.language:.4f}"
    err.print(f"{settings.steps} steps done{mean}", markup=False)
    for written in (result.indexers, result.model):
        if written is not None:
            typer.echo(written)
