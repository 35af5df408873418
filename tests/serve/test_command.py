"""`dsa serve` as a process: mistakes before anything is loaded, and the end that a signal asks for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from dsa.cli.main import app
from dsa.cli.serve import ServedModel, _model_store, _opened
from dsa.cli.waiting import Steps
from dsa.models.loading import LoadedModel
from dsa.models.sparse import sparse_report_of
from dsa.serve.logs import Lines
from dsa.serve.parsing import parse
from dsa.store import Store

KEY = "a-key-of-sixteen-characters"


@pytest.fixture
def folder(loaded: LoadedModel, tmp_path: Path) -> Path:
    loaded.model.save_pretrained(tmp_path / "tiny")
    loaded.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "keys", "expected"),
    [
        (["--host", "0.0.0.0"], None, "--host: 0.0.0.0 can be reached from other machines"),
        (["--api-key-file", "keys.txt"], "# none\n\n", "holds no key"),
        (["--api-key-file", "keys.txt"], "short\n", "expected keys of at least 16 ASCII characters"),
        (["--api-key-file", "nothing.txt"], None, "there is no file"),
        (["--host", "203.0.113.7", "--api-key-file", "keys.txt"], KEY, "cannot listen on 203.0.113.7"),
        (["--log-format", "xml"], None, "log-format"),
    ],
)
def test_mistakes_are_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], keys: str | None, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if keys is not None:
        Path("keys.txt").write_text(keys)
    result = CliRunner().invoke(app, ["serve", "no/model", *arguments])
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", "no/model", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "give another --port" in result.stderr


def test_running_answers_end_after_a_signal(folder: Path) -> None:
    environment = {**os.environ, "DSA_STORE": str(folder / "store")}
    command = [sys.executable, "-m", "dsa", "serve", str(folder / "tiny"), "--port", "0", "--log-format", "json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().partition("/v1 serves tiny")[0]
        assert process.stdout.readline().startswith(f"curl {address}/v1/chat/completions ")
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "A secret."}], "max_tokens": 300}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**asked, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    told = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    [request] = [line for line in told if line["message"] == "request"]
    assert (request["path"], request["status"], request["written"]) == ("/v1/chat/completions", 200, 300)
    assert "secret" not in stderr


def test_how_the_model_is_opened(folder: Path) -> None:
    given = ServedModel(model=str(folder / "tiny"), weights="bf16", kv_dtype="bf16", tokens=8192)
    with Steps(keep=False) as steps:
        loaded = _opened(given, steps)
    assert loaded.packed is not None
    assert sparse_report_of(loaded.model).config.kv_dtype == "bf16"
    # Stretched to twice its own.
    assert loaded.model.config.max_position_embeddings == 8192
    # Indexers without training are other ones in every process.
    assert _model_store(Store(folder / "store"), loaded) is None


def test_lines_of_text() -> None:
    import logging

    record = logging.LogRecord("dsa", logging.INFO, "", 0, "request", (), None)
    record.fields = {"id": "a", "status": 200}
    assert Lines(is_json=False).format(record).endswith(" request id=a status=200")


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.txt", b"Words of it.", "Words of it."),
        ("../../a.html", b"<html><body>Words of it.<script>no</script></body></html>", "Words of it."),
        ("none", b"Words of it.", "Words of it."),
    ],
)
def test_documents_are_read_elsewhere(name: str, raw: bytes, expected: str) -> None:
    document = parse(raw, name)
    assert document.text == expected
    assert "/" not in document.name


def test_reading_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def unending(*_: Any, **options: Any) -> Any:
        raise subprocess.TimeoutExpired("parsing", options["timeout"])

    monkeypatch.setattr(subprocess, "run", unending)
    with pytest.raises(ValueError, match="takes more than 2048 MB of memory or 120 s"):
        parse(b"Words", "a.txt")


def test_what_takes_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's own limits: a page that unpacks to more than it may have is refused in words."""
    started: list[list[str]] = []
    run: Callable[..., Any] = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **options: (started.append(command), run([*command[:2], "-c", HUNGRY], **options))[1],
    )
    with pytest.raises(ValueError, match="takes more than"):
        parse(b"Words", "a.txt")
    assert started[0][-2:] == ["dsa.serve.parsing", "upload.txt"]


HUNGRY = "from dsa.serve import parsing; parsing._limit(); bytearray(3 << 30)"
