"""`dsa train`: teach a model's indexers what its dense attention reads."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dsa.cli import options
from dsa.cli.console import Steps, err, note, notes
from dsa.config import DSAConfig, LayerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsa.train import TokenStream, WarmupResult, WarmupSettings

NO_LAYERS = "none"


class Dtype(StrEnum):
    """Precision of the frozen model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Target(StrEnum):
    """What the indexers learn."""

    far = "far"
    paper = "paper"


class TrainCommand(TyperCommand):
    """Lets `--data` take several files at once, as a shell's `*.txt` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread("--data", args))


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
    model: options.Model,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILES...",
            help="UTF-8 text files, one document each, or token files (.safetensors).",
            show_default=False,
        ),
    ],
    steps: Annotated[
        int,
        typer.Option(metavar="N", help="Sequences to read. Every sequence trains all layers.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, new or empty.", show_default=False)],
    seq_len: Annotated[int, typer.Option(metavar="L", help="Tokens per sequence.")] = 2048,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    lr: Annotated[float, typer.Option(metavar="X", help="Peak learning rate; decays as a cosine to zero.")] = 1e-2,
    warmup_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of linear warm-up; by default a fiftieth of all")
    ] = None,
    queries_per_update: Annotated[
        int | None,
        typer.Option(
            metavar="Q", help="Queries one optimizer step of a layer learns from; by default 64; on a GPU try 512."
        ),
    ] = None,
    updates_per_sequence: Annotated[
        int | None,
        typer.Option(
            metavar="U",
            help="Optimizer steps per layer and sequence; by default every query is used about once.",
        ),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(help="`far` learns what has to be selected; `paper` learns all positions, the always-read too."),
    ] = Target.far,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first weights and of the order of the data.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")] = 50,
    top_k: options.TopK = None,
    local: options.Local = None,
    sinks: Annotated[
        int | None, typer.Option(metavar="N", help="How many of the K are always the first tokens; by default 4")
    ] = None,
    index_heads: Annotated[int | None, typer.Option(metavar="N", help="Indexer heads; by default 4")] = None,
    index_head_dim: Annotated[int | None, typer.Option(metavar="N", help="Indexer head size; by default 32")] = None,
    dense_layers: Annotated[
        str, typer.Option(metavar="LIST", help="Layers that keep full attention: `0,1,5-7`, or `none`.")
    ] = "0",
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Precision of the frozen model; by default float32 on a CPU, else the checkpoint's own"),
    ] = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Train a model's indexers to predict its own attention. The model itself is frozen and stays as it is.

    A step reads one sequence with full attention; all layers' indexers learn from it, several updates each. DIR gets
    indexers.safetensors (for --indexers and `dsa.attach`), state.safetensors (for --resume) and log.jsonl. A run
    that was stopped or killed continues with the same command and --resume, to the same losses.

    [bold]Examples[/]

      dsa train default --data text/*.txt --steps 240 --out runs/mine

      dsa train Qwen/Qwen3-0.6B --data book.txt --steps 500 --out runs/qwen

      dsa eval Qwen/Qwen3-0.6B --file other.txt --indexers runs/qwen
    """
    config = indexer_config(top_k, local, sinks, index_heads, index_head_dim, dense_layers)
    import torch

    from dsa.models.loading import load_model
    from dsa.train import WarmupSettings, read_data

    settings = WarmupSettings(
        steps=steps,
        seq_len=seq_len,
        lr=lr,
        warmup_steps=warmup_steps,
        queries_per_update=queries_per_update,
        updates_per_sequence=updates_per_sequence,
        seed=seed,
        target=target.value,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    precision = None if dtype is None else getattr(torch, dtype.value)
    with notes():
        with Steps() as progress:
            loaded = load_model(model, dtype=precision, device=device, status=progress.status)
            vocabulary = loaded.model.get_input_embeddings().num_embeddings
            stream = read_data(data, loaded.tokenizer, vocabulary, progress.status)
        attach_fresh(loaded.model, config, seed)
        err.print(f"{len(stream):,} tokens of training data", markup=False)
        with interruptible() as interruption:
            result = run(loaded.model, stream, out, settings, checkpoint_every, resume, interruption)
    if result.step < steps:
        err.print(f"stopped after step {result.step} of {steps}; continue with the same command and --resume")
        raise typer.Exit(128 + interruption.signal)
    mean = f", mean KL of the last step {sum(result.kl.values()) / len(result.kl):.4f}" if result.kl else ""
    err.print(f"{steps} steps done{mean}", markup=False)
    typer.echo(result.indexers)


def indexer_config(
    top_k: int | None,
    local: int | None,
    sinks: int | None,
    index_heads: int | None,
    index_head_dim: int | None,
    dense_layers: str,
) -> DSAConfig:
    """The configuration that the options ask for; what was not given is `DSAConfig`'s default."""
    sizes: dict[str, Any] = dict(options.overrides(top_k, local))
    others = {"sinks": sinks, "index_heads": index_heads, "index_head_dim": index_head_dim}
    sizes |= {name: given for name, given in others.items() if given is not None}
    layers = {layer: LayerConfig(dense=True) for layer in parse_layers(dense_layers)}
    return DSAConfig(**sizes, layers=layers)


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
    model: PreTrainedModel,
    stream: TokenStream,
    out: Path,
    settings: WarmupSettings,
    checkpoint_every: int,
    resume: bool,
    interruption: Interruption,
) -> WarmupResult:
    """Trains with progress on stderr: drawn on a terminal, lines elsewhere."""
    from dsa.train import LineReporter, LiveReporter, Reporter, train_indexers

    def with_reporter(reporter: Reporter) -> WarmupResult:
        return train_indexers(
            model,
            stream,
            out,
            settings,
            checkpoint_every=checkpoint_every,
            resume=resume,
            reporter=reporter,
            should_stop=interruption,
        )

    if not err.is_terminal:
        return with_reporter(LineReporter(err))
    with LiveReporter(err) as live:
        return with_reporter(live)
