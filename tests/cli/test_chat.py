"""`dsa chat` over a pipe, in this process, and in a terminal, in one of its own."""

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
FEW = ("--max-new-tokens", "4")
PROMPT = "\x1b[?2004h"
"""What a line editor sends when it begins to read."""
EDITED = "\x1b[?2004l"
"""And when it has read a line."""


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_question_a_line_and_an_answer_each(dsa: Run, tiny: str, text: str) -> None:
    heard = dsa("chat", tiny, *FEW, stdin="Which?\n\nWho?\n")
    told = lines(dsa("chat", tiny, *FEW, "--json", stdin="Which?\n\nWho?\n"))
    assert [each["question"] for each in told] == ["Which?", "", "Who?"]
    assert told[1]["error"] == "the question is empty; type one, or /help"
    assert heard.exit_code == 0
    assert heard.stdout == f"{told[0]['answer']}\n\n{told[2]['answer']}\n"
    assert "error: the question is empty" in heard.stderr
    # The second follows the first, and reads what is new.
    assert [told[0]["turns"], told[2]["turns"]] == [0, 1]
    assert told[2]["tokens_opened"] > told[0]["tokens_read"]
    assert told[2]["tokens_written"] == 4
    assert told[2]["first_token_s"] > 0


def test_commands(dsa: Run, tiny: str, text: str, tmp_path: Path) -> None:
    saved, other = tmp_path / "saved.md", tmp_path / "other.txt"
    other.write_text("Another text, of the sea and the stones in it. " * 3)
    asked = ["/sources", "Which?", "/sources", "/forget", "Who?", f"/open {other}", "Why?", f"/save {saved}"]
    asked += [f"/save {saved}", "/open", f"/open {tmp_path}/nothing", "/nonsense", "/help", " /etc?", "/quit", "No?"]
    told = lines(dsa("chat", tiny, "--file", text, *FEW, "--json", stdin="\n".join(asked)))
    assert len(told) == len(asked) - 2
    assert "there is no answer yet" in told[0]["error"]
    assert told[2]["sources"] == told[1]["sources"]
    assert told[4]["turns"] == 0
    assert told[4]["tokens_opened"] >= 300
    assert told[5]["opened"] == str(other)
    assert told[6]["turns"] == 0
    assert told[7]["saved"] == str(saved)
    assert "is there already" in told[8]["error"]
    assert "expected the name of a file" in told[9]["error"]
    assert "nothing" in told[10]["error"]
    assert "there is no /nonsense" in told[11]["error"]
    assert "/save FILE" in told[12]["commands"]
    assert told[13]["question"] == "/etc?"
    # The file that could not be opened changed nothing.
    assert told[13]["turns"] == 1
    written = saved.read_text()
    assert written.startswith("# other.txt\n\n> Why?\n")
    assert "Which?" not in written


def test_a_conversation_longer_than_the_positions(dsa: Run, tiny: str) -> None:
    asked = "What is kept of a long text when every word may look back at a few others only?"
    result = dsa("chat", tiny, "--max-new-tokens", "30", "--json", stdin=f"{asked}\n" * 4)
    assert [each["turns"] for each in lines(result)] == [0, 1, 1, 1]
    assert "is longer than the model's positions: its first question is left out" in result.stderr


def test_a_question_for_which_positions_are_made(dsa: Run, tiny: str, text: str) -> None:
    long = "Who is it that may look back? " * 12
    result = dsa("chat", tiny, "--file", text, *FEW, "--json", stdin=f"Which?\n{long}\n")
    told = lines(result)
    assert told[1]["tokens_written"] == 4
    assert told[1]["tokens_read"] > 256
    assert "times longer than" in result.stderr
    off = dsa("chat", tiny, *FEW, "--json", "--rope-scaling", "off", stdin=f"{long}\nWhich?\n")
    told = lines(off)
    assert "rope-scaling is off and the model has 256 positions" in told[0]["error"]
    assert told[1]["tokens_written"] == 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--pages", "1"), "there is no PDF to take pages of"),
        (("--tokens", "5"), "there is no document"),
        (("--file", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_mistakes(dsa: Run, tiny: str, given: tuple[str, ...], expected: str) -> None:
    refused = dsa("chat", tiny, *given, stdin="")
    assert refused.exit_code == 2
    assert expected in refused.stderr


class Terminal:
    """The command in a fork of this process, with a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        import torch
        import transformers  # noqa: F401

        from dsa.cli import console
        from dsa.cli.main import run

        self.seen = ""
        self.process, self.handle = pty.fork()
        if self.process == 0:
            code = 70
            try:
                # The parent's threads are not in this process.
                torch.set_num_threads(1)
                os.environ |= {"DSA_STORE": str(folder), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
                sys.stdin = open(0, closefd=False)  # noqa: SIM115
                sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
                console.out.file, console.err.file = sys.stdout, sys.stderr
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.argv = ["dsa", *arguments]
                run()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            finally:
                os._exit(code)

    def type(self, words: str) -> None:
        os.write(self.handle, words.encode())

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """What came up to these words."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, f"no {words!r} in {self.seen!r}"
            if select.select([self.handle], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.handle, 1 << 16).decode(errors="replace")
                except OSError:
                    break
        before, found, self.seen = self.seen.partition(words)
        assert found, f"no {words!r} in {before!r}"
        return before

    def wait_for_more(self, seconds: float = 60) -> None:
        """Until there are words that have not been waited for."""
        end = time.monotonic() + seconds
        while not self.seen.strip():
            assert time.monotonic() < end, "nothing more was written"
            if select.select([self.handle], [], [], 0.2)[0]:
                self.seen += os.read(self.handle, 1 << 16).decode(errors="replace")

    def ended(self) -> int:
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal(tiny: str, text: str, tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(
        ["chat", tiny, "--file", text, "--max-new-tokens", "100000", "--rope-scaling", "yarn:400"], tmp_path / "store"
    )
    yield made
    os.close(made.handle)


def test_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("Ctrl-D the conversation")
    terminal.wait_for(PROMPT)
    # A line that is edited: the last letter is taken back.
    terminal.type("/helpx\x7f\r")
    terminal.wait_for("/forget")
    terminal.type("Which?\r")
    terminal.wait_for("Which?")
    # The answer takes minutes: once it has begun Ctrl-C ends it, and not the program.
    terminal.wait_for(EDITED)
    terminal.wait_for_more()
    os.kill(terminal.process, signal.SIGINT)
    terminal.wait_for("stopped")
    terminal.wait_for(PROMPT)
    terminal.type("/sources\r")
    terminal.wait_for(PROMPT)
    # Ctrl-C leaves a line, Ctrl-D ends.
    terminal.type("half a line\x03")
    terminal.type("\x04")
    assert terminal.ended() == 0
    history = tmp_path / "store" / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+Which?" in history.read_text()
