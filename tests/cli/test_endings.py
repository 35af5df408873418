"""The ways a process ends, tried in every command: what the shell is told, what is left, and that no traceback is.

| ending | exit code | what is left |
|---|---|---|
| SIGINT, SIGTERM | 128 + its number | what was there before, or all of the new; `train` and `read` keep what they did |
| SIGKILL | 137 | the same, and parts that the next run does not mind |
| stdin or stdout closed, or nobody reads | 0 | what a run writes |
| stdout on a full disk | 2 | what a run writes |
| no space, or no permission, where it writes | 2, with the option or the path | what was there before |
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dsa.cli.main import COMMANDS as NAMES
from dsa.cli.main import app
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

Ended = Callable[..., dict[str, Any]]

SMALL = "--top-k 32 --local 8"
COMMANDS = {
    "info": "info",
    "models": "models",
    "demo": f"demo --model {{tiny}} --file {{text}} --tokens 64 {SMALL} --json {{out}}.json",
    "train": "train {tiny} --data {text} --steps 2 --seq-len 64 --top-k 16 --local 4 --out {out}",
    "train a model": (
        "train {tiny} --stage sparse --all-parameters --indexers {indexers} --data {text} --steps 2 --seq-len 64 "
        "--out {out}"
    ),
    "calibrate": "calibrate {tiny} --indexers {indexers} --data {text} --mass 0.5 --quick --out {out}",
    "calibrate a model": ("calibrate {tiny} --indexers {indexers} --data {text} --mass 0.5 --quick --save-model {out}"),
    "read": "read {tiny} --indexers {indexers} --file {long} --no-chat",
    "generate": "generate {tiny} --prompt hello --max-new-tokens 2 --json {out}.json",
    "generate and keep": "generate {tiny} --indexers {indexers} --file {long} --max-new-tokens 2",
    "chat": "chat {tiny} --file {text}",
    "serve": "serve {tiny} --port 0",
    "eval": f"eval {{tiny}} --file {{text}} --tokens 64 {SMALL} --json {{out}}.json",
    "explain": f"explain {{tiny}} --file {{text}} --tokens 64 {SMALL} --out {{out}}.html",
    "export": "export {latent} --indexers {latent_indexers} --out {out}",
    "check": "check {tiny}",
    "cost": "cost --tokens 100000 --top-k 1000 --json {out}.json",
    "bench ops": "bench ops --quick --only quantize --data gaussian --json {out}.json",
    "bench e2e": "bench e2e --quick --only short --model {tiny} --json {out}.json",
    "bench show": "bench show {rows}",
    "store list": "store list",
    "store show": "store show {entry}",
    "store verify": "store verify",
    "store remove": "store remove {entry}",
    "store prune": "store prune --to 0",
}
KEEP = ("read", "generate and keep")
"""Write to the store; the others that write do so to `{out}`."""

ENDS_BY_ITSELF = tuple(name for name in COMMANDS if name != "serve")
WRITE = tuple(name for name, words in COMMANDS.items() if "{out}" in words)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words of `COMMANDS` stand for."""
    folder = tmp_path_factory.mktemp("given")
    found = {name: str(folder / name) for name in ("tiny", "latent", "indexers", "latent_indexers", "store")}
    for name, family in (("tiny", "llama"), ("latent", "deepseek_v3")):
        tiny_model(family, vocab_size=BYTE_VOCABULARY).save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    sentence = "What is kept of a long text, when every word may look back at a few others only? "
    for name, times in (("text", 4), ("long", 14)):
        found[name] = str(folder / f"{name}.txt")
        Path(found[name]).write_text(sentence * times)
    threads = torch.get_num_threads()

    def dsa(words: str) -> str:
        done = CliRunner().invoke(app, words.format(**found).split(), env={"DSA_STORE": found["store"]})
        assert done.exit_code == 0, done.output
        return done.stdout

    dsa("train {tiny} --data {text} --steps 1 --seq-len 64 --top-k 16 --local 4 --out {indexers}")
    sizes = "--index-heads 4 --index-head-dim 16 --top-k 16"
    dsa(f"train {{latent}} --data {{text}} --steps 1 --seq-len 48 {sizes} --out {{latent_indexers}}")
    dsa(COMMANDS["read"])
    [entry] = json.loads(dsa("store list --json"))["entries"]
    found["entry"] = entry["name"]
    dsa(COMMANDS["bench ops"].replace("{out}", str(folder / "rows")))
    found["rows"] = str(folder / "rows.json")
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Ended]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
    environment.pop("DSA_DEBUG", None)
    command = [sys.executable, str(Path(__file__).with_name("ending_server.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(arguments: list[str], **more: Any) -> dict[str, Any]:
            server.stdin.write(json.dumps({"arguments": arguments, **more}) + "\n")
            server.stdin.flush()
            told = json.loads(server.stdout.readline())
            assert "Traceback" not in told["stderr"], told["stderr"]
            assert "Exception ignored" not in told["stderr"], told["stderr"]
            return told

        yield run
        server.stdin.close()


@pytest.fixture
def ended(server: Ended, given: dict[str, str], tmp_path: Path) -> Ended:
    """Runs a command of the table, which writes to `out` in a folder, to its end."""

    def run(command: str, folder: Path | str = tmp_path, **more: Any) -> dict[str, Any]:
        store = Path(folder) / "store"
        if command.startswith("store") and not store.exists():
            shutil.copytree(given["store"], store)
        words = COMMANDS[command].format(**given, out=Path(folder) / "out").split()
        return server(words, environment={"DSA_STORE": str(store)}, **more)

    return run


def test_every_command_is_tried() -> None:
    assert set(NAMES) == {words.split()[0] for words in COMMANDS.values()}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_as_it_begins(command: str, number: int, ended: Ended, tmp_path: Path) -> None:
    told = ended(command, signal=number, at="beginning")
    assert told["code"] == 128 + number
    assert ("stopped" in told["stderr"]) == (number == signal.SIGINT)
    assert [each.name for each in tmp_path.iterdir() if each.name != "store"] == []


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", [*WRITE, *KEEP])
def test_a_signal_as_it_writes(command: str, number: int, ended: Ended, tmp_path: Path) -> None:
    told = ended(command, signal=number, at="writing")
    assert told["code"] == 128 + number
    assert not [each for each in tmp_path.rglob("*") if each.name.endswith(".part")]
    if command.startswith("train"):
        assert "stopped after step 1 of 2; continue with the same command and --resume" in told["stderr"]
    elif command == "read":
        assert "stopping after this step" in told["stderr"]
    else:
        assert ("stopped" in told["stderr"]) == (number == signal.SIGINT)
        assert not [each for each in tmp_path.rglob("*") if each.is_file() and "store" not in each.parts]


@pytest.mark.parametrize("command", [*WRITE, *KEEP])
def test_killed_as_it_writes(command: str, ended: Ended, tmp_path: Path) -> None:
    """What a kill leaves is a part with a name of its own, and the same call afterwards minds nothing."""
    old = '{"old": true}'
    written = tmp_path / "out.json"
    if command in WRITE and "{out}.json" in COMMANDS[command] and not command.startswith("bench"):
        written.write_text(old)
    told = ended(command, signal=signal.SIGKILL, at="writing")
    assert told["code"] == 128 + signal.SIGKILL
    assert not written.exists() or written.read_text() == old
    assert not (tmp_path / "out" / "config.json").exists()
    told = ended(command)
    assert told["code"] == 0, told["stderr"]
    if written.exists():
        assert "old" not in json.loads(written.read_text())


@pytest.mark.parametrize("stdout", ["closed pipe", "closed"])
@pytest.mark.parametrize("command", ENDS_BY_ITSELF)
def test_streams_that_are_closed(command: str, stdout: str, ended: Ended) -> None:
    told = ended(command, stdout=stdout, stdin="closed")
    if command == "chat":
        assert told["code"] == 2
        assert "stdin is closed: pipe questions in" in told["stderr"]
        return
    assert told["code"] == 0, told["stderr"]
    assert "pipe" not in told["stderr"].lower()


def test_a_prompt_from_a_closed_standard_input(server: Ended, given: dict[str, str]) -> None:
    told = server(["generate", given["tiny"]], stdin="closed")
    assert told["code"] == 2
    assert "standard input is closed" in told["stderr"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", [name for name in ENDS_BY_ITSELF if name != "chat"])
def test_standard_output_on_a_full_disk(command: str, ended: Ended) -> None:
    told = ended(command, stdout="/dev/full")
    assert told["code"] == 2
    assert "No space left on device; free some space" in told["stderr"]


@pytest.mark.parametrize("command", [*WRITE, *KEEP])
def test_a_full_disk(command: str, ended: Ended, tmp_path: Path) -> None:
    told = ended(command, full=str(tmp_path))
    if told["missing"]:
        pytest.skip(f"no disk of a few kilobytes can be mounted here ({told['missing']})")
    assert [each for each in told["left"] if not each.endswith(".lock")] == []
    if command == "generate and keep":
        # The answer needs no disk.
        assert told["code"] == 0, told["stderr"]
    else:
        assert told["code"] == 2
        assert "error: " in told["stderr"]
    assert str(tmp_path) in told["stderr"]
    assert ("limited to 0.00 GB" if command in KEEP else "free") in told["stderr"]
    assert "[Errno" not in told["stderr"]


@pytest.mark.parametrize("command", [*WRITE, "read"])
def test_a_folder_that_cannot_be_written(command: str, ended: Ended) -> None:
    """/proc/self can be written by nobody, by root neither; it is said before anything is loaded."""
    told = ended(command, "/proc/self")
    assert told["code"] == 2
    assert "[Errno" not in told["stderr"]
    assert "/proc/self" in told["stderr"]
    option = "--store" if command == "read" else COMMANDS[command].partition("{out}")[0].split()[-1]
    assert f"error: {option}" in told["stderr"]
    assert not told["loaded"]
