"""`dsa export`: a model with trained indexers, as the DeepSeek-V3.2 that plain transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import err, notes, out
from dsa.cli.waiting import Steps


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "export", export, short_help="Write a model with latent attention as a DeepSeek-V3.2.")


def export(
    model: options.Model,
    directory: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.", show_default=False)],
    indexers: options.Indexers = None,
    top_k: options.TopK = None,
    json: options.Json = None,
) -> None:
    """Write a DeepSeek-V3 with trained indexers as the DeepSeek-V3.2 that it has become, for plain transformers.

    MODEL is the checkpoint whose indexers were trained, with --indexers, or the model that the sparse stage wrote.
    It needs latent attention (MLA) and the decoder layers of DeepSeek-V3, as GLM-4.7-Flash has them too. Weights keep
    their precision.

    [bold]Examples[/]

      dsa export deepseek-ai/DeepSeek-V3 --indexers runs/v3 --out v3-sparse
      dsa export runs/v3-sparse/model --out v3-sparse
    """
    from dsa.runs.files import check_new_folder, check_writable, write_json

    check_new_folder(directory)
    if json is not None:
        check_writable(json)
    import dsa
    from dsa.models.families import born_with_dsa
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers

    with notes(), Steps() as steps:
        loaded = load_model(model, dtype="auto", device="cpu", status=steps.status)
        if born_with_dsa(loaded.model.config):
            raise ValueError(f"model: {model} has indexers of its own ({loaded.model.config.model_type}) already")
        if indexers is None and not loaded.is_default and not dsa.is_attached(loaded.model):
            raise ValueError(
                f"model: {model} has no indexers; train some with `dsa train {model} --out RUN`, then name them with "
                "--indexers RUN"
            )
        attached, _ = attach_indexers(loaded, indexers, **options.overrides(top_k, None))
        err.print(str(attached), markup=False, soft_wrap=True)
        steps.status(f"Writing {directory}")
        written = dsa.export_deepseek_v32(loaded.model, directory, tokenizer=loaded.tokenizer)
    if json is not None:
        layers = [dataclasses.asdict(each) for each in attached.layers]
        write_json(json, {"model": model, "written": str(written), "top_k": attached.config.top_k, "layers": layers})
    out.print(f"DeepseekV32ForCausalLM written to {written}", markup=False, soft_wrap=True)
