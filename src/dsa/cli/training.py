"""What `dsa train` does with its options: settings, indexers, interruptions, progress."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from dsa.cli import options
from dsa.cli.console import err, note, notes
from dsa.config import DSAConfig, LayerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsa.models import AttachReport
    from dsa.models.loading import LoadedModel
    from dsa.train import DenseSettings, SparseSettings, TokenStream, TrainingResult, WarmupSettings

NO_LAYERS = "none"
DENSE, SPARSE, MODEL_STAGES = "Dense stage", "Sparse stage", "Dense and sparse stage"
SCRATCH_LR = 1e-3
"""Peak learning rate of random weights, where nobody says."""


class Dtype(StrEnum):
    """Precision of the frozen model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Target(StrEnum):
    """What the indexers learn."""

    far = "far"
    paper = "paper"


class Start(StrEnum):
    """What new indexers begin with."""

    random = "random"
    fitted = "fitted"


class Stage(StrEnum):
    """What is trained."""

    warmup = "warmup"
    sparse = "sparse"
    dense = "dense"


STAGES_OF = {
    **dict.fromkeys(
        ("lora", "lora_alpha", "merge", "all_parameters", "indexer_lr", "distill"),
        (Stage.sparse,),
    ),
    **dict.fromkeys(("parameters", "mixed_precision", "gradient_checkpointing"), (Stage.sparse, Stage.dense)),
    **dict.fromkeys(("from_scratch", "expert_bias_rate"), (Stage.dense,)),
    **dict.fromkeys(("start", "updates_per_sequence"), (Stage.warmup,)),
    **dict.fromkeys(
        (
            *("indexers", "top_k", "local", "sinks", "index_heads", "index_head_dim", "index_rope_dim"),
            *("dense_layers", "target", "queries_per_update"),
        ),
        (Stage.warmup, Stage.sparse),
    ),
}
"""Options that mean something in some stages only."""


class LearningRate(StrEnum):
    """What follows the warm-up of the learning rate."""

    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class Precision(StrEnum):
    """What the dense and the sparse stage compute in."""

    no = "no"
    bf16 = "bf16"


def settings_of(given: dict[str, Any], processes: int) -> WarmupSettings | SparseSettings | DenseSettings:
    """The stage's settings out of the command's options."""
    from dsa.train import DenseSettings, SparseSettings, WarmupSettings

    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()
    }
    plain["sequences"] = plain["sequences"] or processes
    kinds = {Stage.warmup: WarmupSettings, Stage.sparse: SparseSettings, Stage.dense: DenseSettings}
    kind = kinds[Stage(plain["stage"])]
    if kind is SparseSettings:
        plain["index_queries"] = plain["queries_per_update"]
    elif plain["lr"] is None and plain["from_scratch"]:
        plain["lr"] = SCRATCH_LR
    elif plain["lr"] is None:
        del plain["lr"]
    names = {each.name for each in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in plain.items() if name in names})


def refuse_other_stages(ctx: typer.Context, stage: Stage) -> None:
    """Options that the stage would silently ignore end the command.

    Raises:
        ValueError: There is one.
    """
    for parameter in ctx.command.params:
        name = str(parameter.name)
        stages = STAGES_OF.get(name, (stage,))
        if stage not in stages and ctx.params[name] != parameter.default:
            belongs = " and ".join(each.value for each in stages)
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to the {belongs} stage; add --stage {stages[0].value}, or leave "
                "it out"
            )


def indexer_options(
    top_k: int | None,
    local: int | None,
    sinks: int | None,
    index_heads: int | None,
    index_head_dim: int | None,
    index_rope_dim: int | None,
    dense_layers: str | None,
) -> dict[str, Any]:
    """The fields of `DSAConfig` that the options set."""
    sizes: dict[str, Any] = dict(options.overrides(top_k, local))
    others = {
        "sinks": sinks,
        "index_heads": index_heads,
        "index_head_dim": index_head_dim,
        "index_rope_dim": index_rope_dim,
    }
    sizes |= {name: given for name, given in others.items() if given is not None}
    if dense_layers is not None:
        sizes["layers"] = {layer: LayerConfig(dense=True) for layer in parse_layers(dense_layers)}
    return sizes


def fresh_config(model: PreTrainedModel, changes: dict[str, Any]) -> DSAConfig:
    """The configuration of new indexers; what was not given is the default of `dsa.attach`, and layer 0 stays dense.

    With latent attention it does not: every layer of DeepSeek-V3.2, which such a model becomes, selects.
    """
    from dsa.models.attachment import default_config
    from dsa.models.families import family_of

    layers = {0: LayerConfig(dense=True)} if family_of(model).latent is None else {}
    return default_config(model).replace(**{"layers": layers, **changes})


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


def refuse_native(loaded: LoadedModel) -> None:
    """Models born with DSA bring trained indexers, which this command does not train on.

    Raises:
        ValueError: The model is one.
    """
    from dsa.models.families import born_with_dsa

    if born_with_dsa(loaded.model.config):
        raise ValueError(
            f"model: {loaded.name} was born with DSA ({loaded.model.config.model_type}): its indexers are trained, and "
            "dsa train does not train them on; it takes models without indexers. dsa generate runs it sparse"
        )


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


def without_indexers(model: PreTrainedModel) -> None:
    """Takes the indexers off a model that was saved with some; the dense stage trains it without."""
    import dsa

    if dsa.is_attached(model):
        note("the model was saved with indexers; it is trained, and saved, without them")
        dsa.detach(model)


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
    from dsa.models.attached import is_attached
    from dsa.models.sparse import attach_indexers

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


@contextmanager
def heard(is_main: bool) -> Iterator[None]:
    """Lets one process of several speak while the context is open; an error ends it, and is said by each."""
    if is_main:
        with notes():
            yield
        return
    before = err.quiet
    err.quiet = True
    try:
        yield
    finally:
        err.quiet = before


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
    settings: WarmupSettings | SparseSettings | DenseSettings,
    interruption: Interruption,
    *,
    merge: bool,
    tensorboard: bool,
    **others: Any,
) -> TrainingResult:
    """Trains with progress on stderr: drawn on a terminal, lines elsewhere."""
    from dsa.train import (
        LineReporter,
        LiveReporter,
        Reporter,
        Reporters,
        SparseSettings,
        WarmupSettings,
        train_dense,
        train_indexers,
        train_sparse,
    )
    from dsa.train.tensorboard import TensorBoardReporter

    is_main = others["processes"].is_main
    device = others["processes"].device or loaded.model.device
    boards = [TensorBoardReporter(out / "tensorboard", device)] if tensorboard and is_main else []

    def with_reporter(*reporters: Reporter) -> TrainingResult:
        told = Reporters(*reporters, *boards)
        common = {"reporter": told, "should_stop": interruption, **others}
        if isinstance(settings, WarmupSettings):
            return train_indexers(loaded.model, stream, out, settings, **common)
        common["tokenizer"] = loaded.tokenizer
        if isinstance(settings, SparseSettings):
            return train_sparse(loaded.model, stream, out, settings, merge=merge, **common)
        return train_dense(loaded.model, stream, out, settings, **common)

    if not is_main:
        return with_reporter()
    if not err.is_terminal:
        return with_reporter(LineReporter(err))
    with LiveReporter(err) as live:
        return with_reporter(live)
