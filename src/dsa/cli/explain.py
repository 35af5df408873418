"""`dsa explain`: one HTML file that shows what a model read of a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import options
from dsa.cli.commands import add_command
from dsa.cli.console import note, notes, out
from dsa.cli.opening import ModelOptions, announced, check_question, open_model
from dsa.cli.waiting import Steps

if TYPE_CHECKING:
    from dsa.documents.prompt import Prompt
    from dsa.models.extension import Demand


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """What is read, and what is asked about it."""

    file: Annotated[
        Path, typer.Option(metavar="FILE", help="PDF, HTML, Markdown or UTF-8 text to read.", show_default=False)
    ]
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A question to put after the document, in the model's chat template if it has one.",
        ),
    ] = None
    begin: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Begin the answer with this, and let the model go on.")
    ] = None
    pages: options.Pages = None
    tokens: options.FirstTokens = None
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, metavar="N", help="Tokens to write at most.")] = 48
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the document into the model's chat template, as the user's turn; by default with --ask only.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is written."""

    report: Annotated[Path, typer.Option("--out", metavar="OUT", help="The HTML file to write.")] = Path("report.html")
    dense: Annotated[
        bool, typer.Option("--dense", help="Measure the dense prefill too, in place of an estimate: much slower.")
    ] = False
    json: options.Json = None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "explain", explain, short_help="Show what was read of a document, as one HTML file.")


def explain(reading: DocumentOptions, writing: ReportOptions, given: ModelOptions) -> None:
    """Show what a model reads of a document: one HTML file that opens in any browser, without a network.

    It has the text, shaded by what was selected; what each token of the answer read, by layer and passage, with the
    page; what a sliding window of the same size would have missed; time and memory next to dense attention. The
    question is asked as `dsa generate` asks it, and what is longer than the model's positions is read with stretched
    ones.

    [bold]Examples[/]

      dsa explain default --file report.pdf --ask "Who signed it?" --out report.html
      dsa explain default --file thesis.txt --tokens 8000
    """
    from dsa.documents import read_source
    from dsa.documents.prompt import check_places, make_prompt
    from dsa.runs.files import check_writable, write_json

    check_question(reading.ask, None, [reading.file])
    check_writable(writing.report, "out")
    if writing.json is not None:
        check_writable(writing.json)
    with notes(), Steps(keep=False) as steps:
        document = read_source(reading.file, progress=steps, pages=reading.pages)

    from dsa.generation.prompt import demand_of
    from dsa.generation.session import Session
    from dsa.report.explaining import explain as explained
    from dsa.report.page import write_page

    def encode(tokenizer: Any) -> tuple[Prompt, Demand]:
        check_places(tokenizer)
        made = make_prompt(
            tokenizer, document, reading.ask, tokens=reading.tokens, chat=reading.chat, begin=reading.begin
        )
        return made, demand_of(made, reading.max_new_tokens)

    with notes(), Steps(keep=False) as steps:
        loaded, report, prompt = open_model(given, encode, steps)
        session = Session(loaded.model)
        explanation = explained(
            loaded,
            document,
            prompt,
            ask=reading.ask,
            new_tokens=reading.max_new_tokens,
            measure_dense=writing.dense,
            session=session,
            progress=announced(loaded, report, session, prompt, steps),
        )
        steps.status("Writing the report")
        written = write_page(writing.report, explanation)
    if writing.json is not None:
        write_json(writing.json, explanation.to_json())
    for remark in explanation.notes:
        note(remark)
    out.print(explanation.answer_text.strip(), markup=False)
    out.print(f"\nReport written to {written} ({written.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)
    if writing.json is not None:
        out.print(f"Figures written to {writing.json}", markup=False, soft_wrap=True)
