"""`dsa train`: teach a model's indexers what its dense attention reads."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext as silent
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dsa.cli import options
from dsa.cli.configuration import read_config, write_config
from dsa.cli.console import Steps, err, note, notes
from dsa.config import DSAConfig, LayerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsa.models import AttachReport
    from dsa.models.loading import LoadedModel
    from dsa.train import SparseSettings, TokenStream, TrainingResult, WarmupSettings

NO_LAYERS = "none"
LISTS = ("data", "holdout")
DATA, SCHEDULE, SPARSE, INDEXERS = "Data", "Learning", "Sparse stage", "Indexers"


class Dtype(StrEnum):
    """Precision of the frozen model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Target(StrEnum):
    """What the indexers learn."""

    far = "far"
    paper = "paper"


class Stage(StrEnum):
    """What is trained."""

    warmup = "warmup"
    sparse = "sparse"


class LearningRate(StrEnum):
    """What follows the warm-up of the learning rate."""

    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class Precision(StrEnum):
    """What the sparse stage computes in."""

    no = "no"
    bf16 = "bf16"


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
            "(.safetensors); or hub:OWNER/NAME[[:CONFIG[[:SPLIT]]]].",
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
            "selection on."
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
            help="Peak learning rate: of the indexers in the warm-up, by default 0.01; of the model in the sparse "
            "stage, by default 1e-4 for --lora, else 1e-5",
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
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Of the first weights and of the order of the data.", rich_help_panel=SCHEDULE),
    ] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")] = 50,
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
            rich_help_panel=SPARSE,
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
    mixed_precision: Annotated[Precision, typer.Option(help="Compute in bf16.", rich_help_panel=SPARSE)] = Precision.no,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory: activations within layers are computed twice.",
            rich_help_panel=SPARSE,
        ),
    ] = False,
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
            help="How many of the K are always the first tokens; by default 4",
            rich_help_panel=INDEXERS,
        ),
    ] = None,
    index_heads: Annotated[
        int | None, typer.Option(metavar="N", help="Indexer heads; by default 4", rich_help_panel=INDEXERS)
    ] = None,
    index_head_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Indexer head size; by default 32", rich_help_panel=INDEXERS)
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Layers that keep full attention: `0,1,5-7`, or `none`; by default 0",
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
    """Train a model's indexers to predict its own attention, or a model to live with its indexers.

    The warm-up leaves the model as it is: it reads with full attention, and all layers' indexers learn from that,
    several updates a step. The sparse stage reads with the selection: the parameters you choose learn from language
    modelling, the indexers from the attention over what they selected.

    DIR gets indexers.safetensors (for --indexers and `dsa.attach`), log.jsonl, state.safetensors (for --resume), and
    in the sparse stage `adapter` or `model`. A run that was stopped or killed continues with the same command and
    --resume, to the same losses. `torchrun --nproc-per-node N -m dsa train ...` shares each step's sequences among N
    processes.

    [bold]Examples[/]

      dsa train default --data text/*.txt --steps 240 --out runs/mine

      dsa train Qwen/Qwen3-0.6B --data books.jsonl --steps 500 --out runs/qwen

      dsa train Qwen/Qwen3-0.6B --data books.jsonl --steps 500 --stage sparse --indexers runs/qwen --lora 16
      --out runs/qwen-sparse

      dsa train --config runs/qwen/run.yaml --out runs/again
    """
    import torch

    from dsa.models.loading import load_model, scaling_wanted
    from dsa.train import Holdout, read_data, start_processes

    if stage is Stage.warmup:
        refuse_sparse_options(ctx)
    processes, own_device = start_processes(device)
    settings = settings_of(ctx.params, processes.size)
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype is None and (all_parameters or parameters is not None):
        dtype = Dtype.float32
    precision = None if dtype is None else getattr(torch, dtype.value)
    with notes() if processes.is_main else silent():
        with Steps() as progress:
            status = progress.status if processes.is_main else None
            scaling = scaling_wanted(rope_scaling, indexers)
            loaded = load_model(model, dtype=precision, device=own_device, status=status, rope_scaling=scaling)
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
        changes = indexer_options(top_k, local, sinks, index_heads, index_head_dim, dense_layers)
        if stage is Stage.sparse:
            attach_trained(loaded, indexers, changes)
        elif indexers is not None:
            attach_existing(loaded.model, indexers, changes)
        else:
            attach_fresh(loaded.model, fresh_config(changes), seed)
        if processes.is_main:
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
    err.print(f"{steps} steps done{mean}", markup=False)
    typer.echo(result.indexers)
    if result.model is not None:
        typer.echo(result.model)


def settings_of(given: dict[str, Any], processes: int) -> WarmupSettings | SparseSettings:
    """The stage's settings out of the command's options."""
    from dsa.train import SparseSettings, WarmupSettings

    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()
    }
    plain["sequences"] = plain["sequences"] or processes
    kind = SparseSettings if plain["stage"] == Stage.sparse.value else WarmupSettings
    if kind is SparseSettings:
        plain["index_queries"] = plain["queries_per_update"]
    elif plain["lr"] is None:
        del plain["lr"]
    names = {each.name for each in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in plain.items() if name in names})


def refuse_sparse_options(ctx: typer.Context) -> None:
    """Options that the warm-up would silently ignore end the command."""
    for parameter in ctx.command.params:
        panel = getattr(parameter, "rich_help_panel", None)
        if panel == SPARSE and ctx.params[str(parameter.name)] != parameter.default:
            name = str(parameter.name).replace("_", "-")
            raise ValueError(f"--{name} belongs to the sparse stage; add --stage sparse, or leave it out")


def indexer_options(
    top_k: int | None,
    local: int | None,
    sinks: int | None,
    index_heads: int | None,
    index_head_dim: int | None,
    dense_layers: str | None,
) -> dict[str, Any]:
    """The fields of `DSAConfig` that the options set."""
    sizes: dict[str, Any] = dict(options.overrides(top_k, local))
    others = {"sinks": sinks, "index_heads": index_heads, "index_head_dim": index_head_dim}
    sizes |= {name: given for name, given in others.items() if given is not None}
    if dense_layers is not None:
        sizes["layers"] = {layer: LayerConfig(dense=True) for layer in parse_layers(dense_layers)}
    return sizes


def fresh_config(changes: dict[str, Any]) -> DSAConfig:
    """The configuration of new indexers; what was not given is `DSAConfig`'s default, and layer 0 stays dense."""
    return DSAConfig(**{"layers": {0: LayerConfig(dense=True)}, **changes})


def parse_layers(text: str) -> list[int]:
    """`"0,5-7"` as `[0, 5, 6, 7]`; `"none"` as `[]`.

    Raises:
        ValueError: Anything else.
    """
    if text.strip().lower() == NO_LAYERS:
        return []
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"dense-layers must be layer numbers like 0,1,5-7, or {NO_LAYERS}, got {text!r}")
        layers.extend(range(int(first), int(last if dash else first) + 1))
    return layers


def attach_fresh(model: PreTrainedModel, config: DSAConfig, seed: int) -> None:
    """Attaches untrained indexers whose weights depend on the seed; a model saved with indexers loses those."""
    import torch

    import dsa

    if dsa.is_attached(model):
        note("the model was saved with indexers; new ones are trained in their place")
        dsa.detach(model)
    torch.manual_seed(seed)
    logger = logging.getLogger("dsa")
    level = logger.level
    # That the indexers are untrained is what the command is about to change.
    logger.setLevel(logging.ERROR)
    try:
        report = dsa.attach(model, config)
    finally:
        logger.setLevel(level)
    tell(report)


def attach_existing(model: PreTrainedModel, indexers: str, changes: dict[str, Any]) -> None:
    """Attaches trained indexers, to train them on; a model saved with indexers loses those."""
    import dsa

    if dsa.is_attached(model):
        note("the model was saved with indexers; those of --indexers take their place")
        dsa.detach(model)
    tell(dsa.attach(model, indexers=indexers, **changes))


def attach_trained(loaded: LoadedModel, indexers: str | None, changes: dict[str, Any]) -> None:
    """Attaches the indexers that the sparse stage starts from.

    Raises:
        ValueError: There are none.
    """
    from dsa.models.attachment import is_attached
    from dsa.models.loading import attach_indexers

    if indexers is None and not loaded.is_default and not is_attached(loaded.model):
        raise ValueError(
            f"the sparse stage needs trained indexers: train some with `dsa train {loaded.name} --out DIR`, then name "
            "them with --indexers DIR"
        )
    report, _ = attach_indexers(loaded, indexers, **changes)
    tell(report)


def tell(report: AttachReport) -> None:
    """Says what is trained."""
    err.print(f"{report.model}: {report.count('sparse')} indexers, {report.parameters:,} weights", markup=False)


class Interruption:
    """Whether the user asked to stop, and through which signal."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        return bool(self.signal)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal lets the running step finish, the second ends at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        note("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once, without one")


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turns Ctrl-C and SIGTERM into a request while the context is open."""
    interruption = Interruption()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interruption.handle) for number in numbers]
    try:
        yield interruption
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def run(
    loaded: LoadedModel,
    stream: TokenStream,
    out: Path,
    settings: WarmupSettings | SparseSettings,
    interruption: Interruption,
    *,
    merge: bool,
    tensorboard: bool,
    **others: Any,
) -> TrainingResult:
    """Trains with progress on stderr: drawn on a terminal, lines elsewhere."""
    from dsa.train import LineReporter, LiveReporter, Reporter, Reporters, WarmupSettings, train_indexers, train_sparse
    from dsa.train.tensorboard import TensorBoardReporter

    is_main = others["processes"].is_main
    boards = [TensorBoardReporter(out / "tensorboard", loaded.model.device)] if tensorboard and is_main else []

    def with_reporter(*reporters: Reporter) -> TrainingResult:
        told = Reporters(*reporters, *boards)
        if isinstance(settings, WarmupSettings):
            return train_indexers(
                loaded.model, stream, out, settings, reporter=told, should_stop=interruption, **others
            )
        return train_sparse(
            loaded.model,
            stream,
            out,
            settings,
            tokenizer=loaded.tokenizer,
            merge=merge,
            reporter=told,
            should_stop=interruption,
            **others,
        )

    if not is_main:
        return with_reporter()
    if not err.is_terminal:
        return with_reporter(LineReporter(err))
    with LiveReporter(err) as live:
        return with_reporter(live)
