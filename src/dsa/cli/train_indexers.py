"""Which indexers a run of `dsa train` begins with, attached to its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsa.cli.console import err, note
from dsa.cli.train_options import IndexerOptions
from dsa.config import DSAConfig, LayerConfig
from dsa.runs.quiet import quiet_dsa

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsa.models import AttachReport
    from dsa.models.loading import LoadedModel
    from dsa.train.settings import DenseSettings, SparseSettings, WarmupSettings

NO_LAYERS = "none"


def attach_for(
    loaded: LoadedModel, settings: WarmupSettings | SparseSettings | DenseSettings, options: IndexerOptions
) -> None:
    """Attaches the indexers that the stage of these settings begins with, or takes a model's own off.

    Raises:
        ValueError: The stage needs trained indexers and there are none, or an option is out of range.
    """
    from dsa.train.settings import DenseSettings, SparseSettings

    changes = config_changes(options)
    if isinstance(settings, DenseSettings):
        detach_indexers(loaded.model)
    elif isinstance(settings, SparseSettings):
        attach_trained(loaded, options.indexers, changes)
    elif options.indexers is not None:
        attach_existing(loaded.model, options.indexers, changes)
    else:
        attach_fresh(loaded.model, fresh_config(loaded.model, changes, settings.seq_len), settings.seed)
    if not isinstance(settings, DenseSettings):
        warn_of_no_selection(loaded.model, settings)


def config_changes(options: IndexerOptions) -> dict[str, Any]:
    """The fields of `DSAConfig` that the options set."""
    names = ("top_k", "local", "sinks", "index_heads", "index_head_dim", "index_rope_dim")
    changes: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.selections is not None:
        changes["selections"] = int(options.selections) if options.selections.isdecimal() else options.selections
    if options.dense_layers is not None:
        changes["layers"] = {layer: LayerConfig(dense=True) for layer in parse_layers(options.dense_layers)}
    return {name: given for name, given in changes.items() if given is not None}


def fresh_config(model: PreTrainedModel, changes: dict[str, Any], seq_len: int) -> DSAConfig:
    """The configuration of new indexers; what was not given is the default of `dsa.attach`, and layer 0 stays dense.

    With latent attention it does not: every layer of DeepSeek-V3.2, which such a model becomes, selects. The budget is
    no larger than a part of a sequence, so that held-out text shows what the indexers find.
    """
    from dsa.models.attachment import default_config
    from dsa.models.families import family_of

    layers = {0: LayerConfig(dense=True)} if family_of(model).latent is None else {}
    config = default_config(model).replace(**{"layers": layers, **changes})
    if "top_k" in changes:
        return config
    always = config.sinks + config.local
    return config.replace(top_k=min(config.top_k, max(seq_len // 4, always + seq_len // 16)))


def warn_of_no_selection(model: PreTrainedModel, settings: WarmupSettings | SparseSettings) -> None:
    """Says so where the sequences are so short that every query reads all of them."""
    from dsa.models.attached import config_of
    from dsa.train.holdout import selects_nothing
    from dsa.train.settings import SparseSettings

    config = config_of(model)
    if selects_nothing(model, config, settings.seq_len):
        learns = (
            "the model learns with full attention"
            if isinstance(settings, SparseSettings)
            else ("held-out text cannot show what the indexers find")
        )
        note(
            f"sequences of {settings.seq_len:,} tokens fit into the budget of {config.top_k:,}, so nothing is selected "
            f"and {learns}; give a longer --seq-len or a smaller --top-k"
        )


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


def refuse_born_with_dsa(loaded: LoadedModel) -> None:
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
    # That the indexers are untrained is what the command is about to change.
    with quiet_dsa():
        report = dsa.attach(model, config)
    show_report(report)


def detach_indexers(model: PreTrainedModel) -> None:
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
    show_report(dsa.attach(model, indexers=indexers, **changes))


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
    show_report(report)


def show_report(report: AttachReport) -> None:
    """Prints what is trained."""
    err.print(f"{report.model}: {report.count('sparse')} indexers, {report.parameters:,} weights", markup=False)
