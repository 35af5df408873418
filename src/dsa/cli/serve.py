"""`dsa serve`: an OpenAI-compatible server over documents that stay read."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsa.cli import options
from dsa.cli.checks import at_most
from dsa.cli.commands import add_command
from dsa.cli.console import note, notes, out, without_messages
from dsa.cli.opening import STRETCHED_INDEXERS, UNTRAINED, ModelOptions, StoreOptions, opened_store
from dsa.cli.waiting import Steps, drawn_elsewhere

if TYPE_CHECKING:
    from dsa.models.loading import LoadedModel
    from dsa.serve.keys import Keys
    from dsa.store import ModelStore, Store

MOST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServedModel(ModelOptions):
    """Which model, and how it is attached and run."""

    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            callback=at_most("--tokens", options.MOST_TOKENS),
            help="Positions of a prompt with its answer; by default the model's own. For more, positions are "
            "stretched, for short prompts too.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Whom it serves, and how much."""

    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where it listens. Any but this machine's own needs --api-key-file.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=MOST_PORT, metavar="P", help="Its port; 0 takes one that is free.")
    ] = 8000
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys of clients, one a line. What one key's client sent or had read, no other sees."
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that clients call this server by, as behind a proxy; repeatable."),
    ] = None
    max_sessions: Annotated[
        int, typer.Option(min=1, max=256, metavar="N", help="Requests worked on at once, and caches kept in memory.")
    ] = 8
    max_queue: Annotated[int, typer.Option(min=1, max=10_000, metavar="N", help="Requests that wait at most.")] = 64
    max_seconds: Annotated[
        int, typer.Option(min=1, metavar="S", help="Seconds that a request may take, waiting included.")
    ] = 1800
    max_upload: Annotated[int, typer.Option(min=1, max=512, metavar="MB", help="Size of an upload at most.")] = 64
    log_format: Annotated[
        Literal["text", "json"], typer.Option(metavar="KIND", help="How it logs to stderr: `text` or `json`.")
    ] = "text"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "serve", serve, short_help="Serve a model through OpenAI's API, over documents that stay read.")


def serve(given: ServedModel, serving: Serving, keeping: StoreOptions) -> None:
    """Serve a model through OpenAI's API, over documents that stay read.

    Programs that speak that API use it at /v1: chat completions, completions, responses, files. A document in a message
    is read once, and every further question about it begins to be answered at once, after a restart, too. Ctrl-C lets
    running answers end.

    [bold]Examples[/]

      dsa serve default
      dsa serve default --tokens 32768 --port 8080 --store documents
      dsa serve default --host 0.0.0.0 --api-key-file keys.txt --log-format json
    """
    try:
        from dsa.serve.app import Options, create_app
        from dsa.serve.engine import Limits
        from dsa.serve.keys import Keys, read_keys
        from dsa.serve.logs import log_to_stderr
        from dsa.serve.running import address_of, check_address, listen, run
    except ImportError as error:
        raise ImportError(f"serve needs more packages: pip install 'dsa-attention[serve]' ({error})") from error
    keys = Keys() if serving.api_key_file is None else read_keys(serving.api_key_file)
    check_address(serving.host, keys)
    store = opened_store(keeping)
    listening = listen(serving.host, serving.port)
    with notes(), Steps(keep=False) as steps:
        loaded = _opened(given, steps)
        kept = _model_store(store, loaded)
    app = create_app(
        loaded,
        store=kept,
        options=Options(
            keys=keys,
            hosts=_hosts(serving),
            limits=Limits(sessions=serving.max_sessions, queue=serving.max_queue, time_s=float(serving.max_seconds)),
            most_upload=serving.max_upload << 20,
        ),
    )
    log_to_stderr(serving.log_format)
    with drawn_elsewhere():
        run(app, listening, lambda: _say(address_of(listening), app.state.name, keys))


def _opened(given: ServedModel, steps: Steps) -> LoadedModel:
    """The model with its indexers."""
    import torch

    from dsa.models.extension import Demand, chosen_scaling
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    demand = Demand(given.tokens or 0, 0, 0)
    scaling = chosen_scaling(
        given.model,
        given.rope_scaling,
        given.indexers,
        lambda tokenizer: demand,
        lambda demand, positions: f"up to {positions:,} (--tokens {positions}) are read well",
    )
    loaded = load_model(
        given.model, device=given.device, status=steps.status, rope_scaling=scaling, weights=given.weights
    )
    overrides = options.overrides(given.top_k, given.local, given.index_dtype, given.kv_dtype)
    with without_messages(STRETCHED_INDEXERS if given.rope_scaling is None else None):
        report, _ = attach_indexers(loaded, given.indexers, cache=given.cache, **overrides)
    if not report.trained:
        note(UNTRAINED)
    return loaded


def _model_store(store: Store | None, loaded: LoadedModel) -> ModelStore | None:
    """The store for the model; untrained indexers are other ones in every process, and keep nothing."""
    from dsa.models.sparse import sparse_report_of
    from dsa.store import ModelStore

    if store is None or not sparse_report_of(loaded.model).trained:
        return None
    return ModelStore(store, loaded.model, loaded.name)


def _hosts(serving: Serving) -> list[str]:
    from dsa.serve.running import is_loopback

    own = [] if is_loopback(serving.host) else [socket.gethostname()]
    return [*own, *(serving.allow_host or ())]


def _say(address: str, model: str, keys: Keys) -> None:
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    message = '{"model": "%s", "messages": [{"role": "user", "content": "Hello"}]}' % model  # noqa: UP031
    out.print(f"{address}/v1 serves {model}; Ctrl-C ends it. Try:", markup=False, soft_wrap=True)
    out.print(
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{message}'",
        markup=False,
        soft_wrap=True,
    )
