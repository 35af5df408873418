"""`dsa chat`: a conversation, about a document if one is named, in the terminal or over a pipe."""

from __future__ import annotations

import json as plain_json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa.cli import ends, options
from dsa.cli.checks import at_most
from dsa.cli.commands import ListCommand, add_command
from dsa.cli.console import err, note, out, print_error, quietly
from dsa.cli.opening import ModelOptions, StoreOptions, model_or_file, opened_store
from dsa.cli.waiting import drawn_elsewhere

if TYPE_CHECKING:
    from dsa.cli.conversation import Conversation, Said
    from dsa.documents import SourceDocument
    from dsa.store import Store

COMMANDS = {
    "/sources": "the pages and passages that the last answer read, with their share",
    "/open FILE": "talk about this document from here on",
    "/save FILE": "write the conversation as Markdown",
    "/forget": "begin a new conversation; the document stays",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}

HISTORY = "chat-history"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What is talked about, and how."""

    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            metavar="FILE...",
            help="PDF, HTML, Markdown or text files to talk about, or folders of such.",
            show_default=False,
        ),
    ] = None
    pages: options.Pages = None
    tokens: options.FirstTokens = None
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template; by default if it has one."),
    ] = None
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            callback=at_most("--max-new-tokens", options.MOST_TOKENS),
            help="Tokens of an answer at most.",
        ),
    ] = 512
    temperature: options.Temperature = 0.0
    top_p: options.TopP = 1.0
    seed: options.Seed = None
    json: Annotated[bool, typer.Option("--json", help="Write a line of JSON for each line read.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Write answers and errors, nothing else.")] = False


def register(app: typer.Typer) -> None:
    """Adds the command."""
    add_command(app, "chat", chat, short_help="Talk with a model, about a document if you like.", cls=ListCommand)


def chat(talking: ChatOptions, given: ModelOptions, keeping: StoreOptions) -> None:
    """Talk with a model in the terminal, about a document if one is named.

    Each question follows the ones before. The document is read once and kept, as `dsa generate` keeps it. Ctrl-C ends
    an answer and not the program; Ctrl-D ends the program. /help lists what else can be typed: /sources, /open FILE,
    /save FILE, /forget. A question that begins with a slash is typed with a space in front.

    Over a pipe each line is a question, and each answer is written as it comes; with --json there is one line of JSON
    for each line read.

    [bold]Examples[/]

      dsa chat
      dsa chat default --file report.pdf
      dsa chat report.pdf --temperature 0.7
      cat questions.txt | dsa chat default --file report.pdf --json > answers.jsonl
    """
    given, files = model_or_file(given, talking.file or [])
    if talking.pages is not None and not files:
        raise ValueError("pages: there is no PDF to take pages of; add --file FILE, or leave --pages out")
    if talking.tokens is not None and not files:
        raise ValueError("tokens: there is no document to take them of; add --file FILE, or leave --tokens out")
    store = opened_store(keeping)
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and not talking.json
    document = _read(files, talking.pages) if files else None
    import torch

    from dsa.cli.conversation import Conversation, Stop

    if talking.seed is not None:
        torch.manual_seed(talking.seed)
    with quietly(talking.quiet):
        stop = Stop(is_listening=is_terminal)
        conversation = Conversation(given, store, tokens=talking.tokens, chat=talking.chat, stop=stop)
        try:
            conversation.open(document)
            talk = _Talk(conversation, talking, is_terminal)
            for line in _typed(store) if is_terminal else _piped():
                if not talk.hear(line):
                    break
        finally:
            conversation.close()


class _Talk:
    """Answers lines: questions and commands."""

    def __init__(self, conversation: Conversation, talking: ChatOptions, is_terminal: bool) -> None:
        self._conversation, self._talking, self._is_terminal = conversation, talking, is_terminal
        self._commands: dict[str, Callable[[str], Any]] = {
            "/sources": self._sources,
            "/open": self._open,
            "/save": self._save,
            "/forget": self._forget,
            "/help": self._help,
        }

    def hear(self, line: str) -> bool:
        """Answers a line, and says whether to go on."""
        name, _, rest = line.rstrip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        is_command = name.startswith("/")
        try:
            if is_command and name not in self._commands:
                raise ValueError(f"there is no {name}; /help lists what there is")
            told = self._commands[name](rest.strip()) if is_command else self._ask(line.strip())
        except (ValueError, OSError) as error:
            message = ends.message(error)
            print_error(message)
            told = {"error": message}
        except KeyboardInterrupt:
            # Before or after the answer itself, which listens for it.
            if not self._is_terminal:
                raise
            note("stopped")
            return True
        if self._talking.json:
            heard = {"command": line.rstrip()} if is_command else {"question": line.strip()}
            print(plain_json.dumps({**heard, **told}, ensure_ascii=False), flush=True)
        elif "error" in told and not is_command and not self._is_terminal:
            # As many answers as questions.
            print(flush=True)
        return True

    def _ask(self, question: str) -> dict[str, Any]:
        from dsa.cli.generate_table import placed, show_sources, show_timings
        from dsa.text import checked

        if not checked(question, "question:"):
            raise ValueError("the question is empty; type one, or /help")
        talking, is_json = self._talking, self._talking.json
        options = {name: getattr(talking, name) for name in ("max_new_tokens", "temperature", "top_p")}
        said = self._conversation.ask(question, (lambda piece: None) if is_json else _say, **options)
        if said is None:
            note("stopped before the answer began; ask again to go on from there")
            return {"answer": "", "stopped": True}
        if not is_json:
            print(flush=True)
        answer, timings = said.answer, said.answer.timings
        if said.is_stopped:
            note("stopped")
        show_timings(timings)
        if said.document is not None:
            show_sources(answer.sources, said.document)
        return {
            "answer": answer.text,
            "stopped": said.is_stopped,
            "sources": placed(answer.sources, said.document),
            "turns": answer.turns,
            "tokens_read": timings.read,
            "tokens_opened": timings.held,
            "tokens_written": timings.written,
            "first_token_s": timings.first_token_s,
            "token_ms": None if timings.token_s is None else 1e3 * timings.token_s,
        }

    def _sources(self, _: str) -> dict[str, Any]:
        from dsa.cli.generate_table import placed

        said = self._last()
        lines = list(_source_lines(said))
        if not self._talking.json:
            for line in lines or ["the answer chose nothing: everything was read, or there is no document"]:
                out.print(line, markup=False, soft_wrap=True)
        return {"sources": placed(said.answer.sources, said.document)}

    def _open(self, name: str) -> dict[str, Any]:
        if not name:
            raise ValueError("/open: expected the name of a file after it")
        document = _read([Path(name).expanduser()], None)
        self._conversation.forget()
        self._conversation.open(document)
        note(f"talking about {document.name}")
        return {"opened": document.name}

    def _save(self, name: str) -> dict[str, Any]:
        from dsa.runs.files import check_writable, write_atomically

        if not name:
            raise ValueError("/save: expected the name of a file after it")
        self._last()
        file = check_writable(name, "/save")
        if file.exists():
            raise ValueError(f"/save: {name} is there already; give another name")
        write_atomically(file, "\n".join(_markdown(self._conversation.said)).encode(), "/save")
        note(f"saved to {name}")
        return {"saved": str(file)}

    def _forget(self, _: str) -> dict[str, Any]:
        self._conversation.forget()
        note("forgotten; the document stays")
        return {"forgotten": True}

    def _help(self, _: str) -> dict[str, Any]:
        if not self._talking.json:
            for name, what in COMMANDS.items():
                out.print(f"{name:12} {what}", markup=False, soft_wrap=True)
        return {"commands": COMMANDS}

    def _last(self) -> Said:
        if not self._conversation.said:
            raise ValueError("there is no answer yet; ask something first")
        return self._conversation.said[-1]


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _read(files: list[Path], pages: str | None) -> SourceDocument:
    from dsa.cli.console import notes
    from dsa.cli.waiting import Steps
    from dsa.documents import read_sources

    with notes(), Steps(keep=False) as steps:
        return read_sources(files, progress=steps, pages=pages)


def _source_lines(said: Said) -> Iterator[str]:
    """Pages and passages with their shares, most read first."""
    document, sources = said.document, said.answer.sources
    if document is None:
        return
    for page in sources.pages:
        yield f"{document.place(page.page)}: {100 * page.share:.0f} %"
    for each in sources.passages:
        place = "" if each.page is None else f"{document.place(each.page)}, "
        yield f"{place}{100 * each.share:.0f} %: {each.text}"


def _markdown(said: list[Said]) -> Iterator[str]:
    """A conversation as Markdown: questions as quotations, answers as they are, and what they read."""
    for number, each in enumerate(said):
        if number == 0 or each.document is not said[number - 1].document:
            yield f"# {'Conversation' if each.document is None else Path(each.document.name).name}\n"
        yield f"> {each.question}\n"
        yield each.answer.text.strip() + (" …" if each.is_stopped else "") + "\n"
        yield from (f"- {line}" for line in _source_lines(each))
        yield ""


def _piped() -> Iterator[str]:
    """Lines of stdin."""
    if sys.stdin is None:
        raise ValueError("stdin is closed: pipe questions in, one a line, or run it in a terminal")
    for line in sys.stdin:
        yield line.removesuffix("\n")


def _typed(store: Store | None) -> Iterator[str]:
    """Lines that the user edits, with a history. Ctrl-C leaves a line, Ctrl-D ends."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter

    paths = PathCompleter(expanduser=True)
    names = {name.split()[0]: paths if "FILE" in name else None for name in COMMANDS}
    session: PromptSession[str] = PromptSession(
        history=_history(store), completer=NestedCompleter.from_nested_dict(names), complete_while_typing=False
    )
    err.print("Ctrl-C ends an answer, Ctrl-D the conversation; /help lists what else there is", style="dim")
    while True:
        with drawn_elsewhere():
            try:
                line = session.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
        if line.strip():
            yield line


def _history(store: Store | None) -> Any:
    """What was typed before, in the store, for the user's eyes only; without a store in memory."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            # A full disk is no reason not to answer.
            with suppress(OSError):
                super().store_string(string)

    if store is None:
        return InMemoryHistory()
    file = store.folder / HISTORY
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return History(str(file))
