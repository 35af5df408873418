"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dsa.cli.checks import at_most, check_model, check_threads, check_weights

MODEL_HELP = "Hugging Face id, local directory, GGUF file, or `default`."

MOST_TOKENS = 1 << 24
"""Of a context: more than any model reads."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False, callback=check_model)]
Indexers = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Trained indexers: a safetensors file or the folder `dsa train` wrote. Without it: the model's own, "
        "or untrained ones.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", metavar="K", callback=at_most("--top-k", MOST_TOKENS), help="Tokens each query reads."),
]
Local = Annotated[int | None, typer.Option(metavar="N", help="How many of the K are always the most recent tokens.")]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Of models born with DSA: `fp8` keeps latents as FP8 rows, 656 bytes a token and layer in DeepSeek's "
        "sizes; by default `full`, as the model computes.",
    ),
]
IndexDtype = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="How index keys are stored: `int8`, `fp8` or `fp32`; by default as the indexers were trained or saved, "
        "`fp32` for models born with DSA.",
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype",
        metavar="KIND",
        help="How keys and values are kept, in memory and on disk: `fp32`, `bf16` or `fp16`, never wider than the "
        "model computes; by default as it computes.",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; above 0 samples.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="P", help="Sample from the likeliest tokens of this mass.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")]
Pages = Annotated[
    str | None,
    typer.Option(metavar="PAGES", help="Read these pages of a PDF only, counted from 1: `12`, `1-50`, `1-10,40-`."),
]
FirstTokens = Annotated[
    int | None, typer.Option("--tokens", min=2, metavar="N", help="Read the document's first N tokens only.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        callback=check_weights,
        help="How weights are stored and multiplied on a CPU: `fp32`, `bf16`, `int8`, `int4`, or `auto`, which `dsa "
        "info` explains; by default as the model is stored, `fp32` where it is not packed.",
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        metavar="KIND:X",
        help="For texts longer than the model's positions: `yarn:4`, `linear:2`, JSON as transformers takes it, or "
        "`off`; by default what the indexers were trained with",
    ),
]
Extension = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="KIND:X",
        help="For texts longer than the model's positions: `yarn:4`, `linear:2`, JSON as transformers takes it, or "
        "`off` to refuse them; by default what the indexers were trained with, else YaRN as far as needed",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Positions in all, the continuation included; by default 8192, or all of a shorter text."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the figures to this file as JSON.")]
PrintJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", callback=check_threads, help="CPU threads; by default torch's choice."),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="`cpu` or `cuda`; by default cuda if there is one.")]

StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Where documents that were read are kept, to be opened at once the next time; by default `$DSA_STORE`, "
        "else `store` in dsa's cache folder. What is kept can be read by whoever may read your files.",
    ),
]
NoStore = Annotated[bool, typer.Option("--no-store", help="Keep nothing, and open nothing that was kept.")]


def overrides(
    top_k: int | None, local: int | None, index_dtype: str | None = None, kv_dtype: str | None = None
) -> dict[str, Any]:
    """The fields of `DSAConfig` that the user set."""
    fields = {"top_k": top_k, "local": local, "index_dtype": index_dtype, "kv_dtype": kv_dtype}
    return {name: given for name, given in fields.items() if given is not None}
