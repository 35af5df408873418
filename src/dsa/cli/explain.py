"""`dsa explain`: one HTML file that shows what a model read of a document."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.console import Steps, err, note, notes, out
from dsa.cli.generate import POSITIONS_WARNING, check_question

if TYPE_CHECKING:
    from dsa.documents.prompt import Prompt
    from dsa.models.extension import Demand


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("explain", short_help="Show what was read of a document, as one HTML file.")(explain)


def explain(
    model: options.Model,
    file: Annotated[
        Path, typer.Option(metavar="FILE", help="PDF, HTML, Markdown or UTF-8 text to read.", show_default=False)
    ],
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A question to put behind the document, in the model's chat template if it has one.",
        ),
    ] = None,
    begin: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Begin the answer with this, and let the model go on.")
    ] = None,
    pages: options.Pages = None,
    tokens: options.FirstTokens = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, metavar="N", help="Tokens to write at most.")] = 48,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the document into the model's chat template, as the user's turn; by default with --ask only.",
        ),
    ] = None,
    report: Annotated[Path, typer.Option("--out", metavar="OUT", help="The HTML file to write.")] = Path("report.html"),
    dense: Annotated[
        bool, typer.Option("--dense", help="Measure the dense prefill too, in place of an estimate: much slower.")
    ] = False,
    top_k: options.TopK = None,
    local: options.Local = None,
    indexers: options.Indexers = None,
    json: options.Json = None,
    threads: options.Threads = None,
    device: options.Device = None,
    rope_scaling: options.Extension = None,
) -> None:
    """Show what a model reads of a document: one HTML file that opens in any browser, without a network.

    It has the text, shaded by what was selected; what each token of the answer read, by layer and passage, with the
    page; what a sliding window of the same size would have missed; time and memory beside dense attention. The question
    is asked as `dsa generate` asks it, and what is longer than the model's positions is read with stretched ones.

    [bold]Examples[/]

      dsa explain default --file report.pdf --ask "Who signed it?" --out report.html
      dsa explain default --file thesis.txt --tokens 8000
    """
    from dsa.documents import read_source
    from dsa.documents.prompt import make_prompt
    from dsa.runs.files import check_writable, write_json

    check_question(ask, None, file)
    check_writable(report, "out")
    if json is not None:
        check_writable(json)
    with notes(), Steps() as reading:
        document = read_source(file, progress=reading, pages=pages)
    import torch

    from dsa.generation.room import check_room
    from dsa.models.extension import Demand, chosen_scaling
    from dsa.models.loading import load_model
    from dsa.models.sparse import attach_indexers
    from dsa.report.explanation import CHUNK
    from dsa.report.explanation import explain as explained
    from dsa.report.page import write_page

    if threads is not None:
        torch.set_num_threads(threads)
    with notes(), Steps() as steps:

        @functools.cache
        def asked(tokenizer: Any) -> tuple[Prompt, Demand]:
            made = make_prompt(tokenizer, document, ask, tokens=tokens, chat=chat, begin=begin)
            read = made.parts.count("document")
            return made, Demand(read, len(made.ids) - read, max_new_tokens)

        scaling = chosen_scaling(model, rope_scaling, indexers, lambda tokenizer: asked(tokenizer)[1])
        loaded = load_model(model, device=device, status=steps.status, rope_scaling=scaling)
        # The same is said above, and in the report.
        warnings.filterwarnings("ignore", POSITIONS_WARNING, UserWarning)
        prompt, demand = asked(loaded.tokenizer)
        attached, _ = attach_indexers(loaded, indexers, **options.overrides(top_k, local))
        check_room(loaded, attached.config, demand, CHUNK)
        err.print(str(attached), markup=False, soft_wrap=True)
        explanation = explained(
            loaded, document, prompt, ask=ask, new_tokens=max_new_tokens, measure_dense=dense, progress=steps
        )
        steps.status("Writing the report")
        written = write_page(report, explanation)
    if json is not None:
        write_json(json, explanation.to_json())
    for remark in explanation.notes:
        note(remark)
    out.print(explanation.answer_text.strip(), markup=False)
    out.print(f"\nReport written to {written} ({written.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)
    if json is not None:
        out.print(f"Figures written to {json}", markup=False, soft_wrap=True)
