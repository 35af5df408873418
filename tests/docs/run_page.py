"""Runs the examples of one Markdown page in order, in this process: python tests/docs/run_page.py PAGE FOLDER.

The folder becomes the working directory. It gets what the pages name: tiny models where they name one of the Hub,
texts, a PDF and indexers. Python blocks share one namespace, as they do for a reader who pastes them. Lines that begin
with `dsa` run as the command would; scripts and examples have tests of their own. Sizes that take hours on a real
model are made small, and nothing else is changed.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HUB_MODEL = "Qwen/Qwen3-0.6B"
SENTENCES = "Who signed it? The report says that Maria Holt did, in the spring of the year before. " * 12

# Options whose values would take hours, and what they are here.
SMALL = {
    "--steps": "2",
    "--seq-len": "320",
    "--sequences": "1",
    "--max-new-tokens": "4",
    "--lora": "2",
}


SERVERS: list[Server] = []


class Server:
    """`dsa serve`, until the page ends; the port is one that is free here."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "dsa", *arguments, "--port", str(self.port)]
        # A relative path of modules would not hold in this folder.
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        if "serves" not in self.process.stdout.readline():
            raise SystemExit(f"{shlex.join(command)} has ended")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def takes_minutes(arguments: list[str]) -> bool:
    """Commands that measure a machine, or ask for dozens of needles: their options are read, and they do not run."""
    serves_others = arguments[0] == "serve" and "--host" in arguments
    return arguments[0] in ("bench", "demo") or serves_others or any("needles" in each for each in arguments)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines(block: str) -> list[list[str]]:
    """The arguments of the lines that call `dsa`, comments and what feeds them left out; texts are written."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        if written := re.fullmatch(r'echo "(.*)" > ([\w.]+)', line):
            Path(written[2]).write_text(written[1])
        line = re.sub(r"^(cat|echo) [^|]*\| *", "", line)
        if re.match(r"dsa [a-z-]", line):
            found.append(shlex.split(line, comments=True)[1:])
    return found


def furnish(folder: Path) -> None:
    """Makes what the pages name."""
    import fpdf

    import dsa
    from dsa.testing.tiny_models import tiny_model
    from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

    models = {HUB_MODEL: "qwen3", "path/to/DeepSeek-V3": "deepseek_v3", "configs/small": "deepseek_v3"}
    for name, model_type in models.items():
        layers = {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8} if name == HUB_MODEL else {}
        model = tiny_model(model_type, vocab_size=BYTE_VOCABULARY, max_position_embeddings=16_384, **layers)
        model.save_pretrained(folder / name)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
        tokenizer.save_pretrained(folder / name)
        if name == HUB_MODEL:
            dsa.attach(model, dsa.DSAConfig(top_k=64, index_heads=2, index_head_dim=8, sinks=1, local=8))
            for place in ("runs/qwen", "shuffled"):
                dsa.save_indexers(model, folder / place, trained=True)
    _born_with_dsa(folder / "path/to/model")
    for name in ("thesis", "notes", "a", "b", "c", "books/a", "books/b"):
        file = folder / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(SENTENCES)
    pdf = fpdf.FPDF()
    for number in range(3):
        pdf.add_page()
        pdf.set_font("Helvetica", size=12)
        pdf.multi_cell(0, text=f"Page {number + 1}. {SENTENCES[:400]}")
    pdf.output(str(folder / "report.pdf"))
    shutil.copy(ROOT / "benchmarks" / "results" / "2026-11-29-e2e.json", folder / "e2e.json")


def _born_with_dsa(folder: Path) -> None:
    shutil.copytree(ROOT / "tests" / "data" / "small_deepseek_v32", folder)


def local(text: str) -> str:
    """Python with the small model in place of the default one, which takes its time."""
    text = text.replace('load_model("default")', f'load_model("{HUB_MODEL}")')
    text = text.replace('indexers="default"', 'indexers="runs/qwen"')
    text = text.replace('model="default"', f'model="{Path(HUB_MODEL).name}"')
    for server in SERVERS:
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    return re.sub(r"^print\(simple_evaluate\(.*$", "", text, flags=re.MULTILINE)  # its task is fetched from the network


def arguments_here(given: list[str]) -> list[str]:
    """The same command on the small model, with small sizes, and its patterns of files expanded as a shell does."""
    here: list[str] = []
    for number, each in enumerate(given):
        before = given[number - 1] if number else ""
        if before in SMALL:
            each = SMALL[before]
        elif before == "--top-k" and given[0] != "cost":
            each = "272"
        elif before == "--tokens" and given[0] != "cost":
            each = "600"
        elif each == "default":
            here += (
                [HUB_MODEL] if "--indexers" in given or given[0] == "cost" else [HUB_MODEL, "--indexers", "runs/qwen"]
            )
            continue
        elif "*" in each:
            here += sorted(str(file) for file in Path().glob(each))
            continue
        here.append(each)
    return here


def run_command(given: list[str]) -> None:
    """Runs one command, or only reads its options where it would measure the machine for minutes."""
    import typer
    from typer.testing import CliRunner

    from dsa.cli.main import app

    arguments = arguments_here(given)
    if takes_minutes(arguments):
        root: Any = typer.main.get_command(app)
        context = root.make_context("dsa", list(arguments))
        name, command, rest = root.resolve_command(context, [*context._protected_args, *context.args])
        while hasattr(command, "commands"):
            inner = command.make_context(name, rest, parent=context)
            name, command, rest = command.resolve_command(inner, [*inner._protected_args, *inner.args])
        command.make_context(name, rest, parent=context)
        return
    if arguments[0] == "serve":
        SERVERS.append(Server(arguments))
        return
    if arguments[0] == "train" or "--out" in arguments:
        out = Path(arguments[arguments.index("--out") + 1])
        if out.is_dir():
            shutil.rmtree(out)
    result = CliRunner().invoke(app, arguments, input=SENTENCES)
    if result.exit_code != 0:
        raise SystemExit(
            f"dsa {shlex.join(arguments)}\nexit code {result.exit_code}\n{result.output}\n{result.exception}"
        )


def main(page: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ["DSA_STORE"] = str(folder / "dsa-store")
    furnish(Path())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = {"python": 0, "dsa": 0}
    atexit.register(lambda: [server.end() for server in SERVERS])
    for language, block in blocks(page):
        if language == "python":
            try:
                exec(compile(local(block), f"{page.name}", "exec"), namespace)
            except Exception:
                traceback.print_exc()
                raise SystemExit(f"{page.name}: this block fails in its place on the page:\n{block}") from None
            ran["python"] += 1
        elif not language:
            for given in command_lines(block):
                run_command(given)
                ran["dsa"] += 1
    # On a line of its own: a page may have printed a line without an end.
    print("\n" + json.dumps(ran))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
