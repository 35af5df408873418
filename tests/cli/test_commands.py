"""The commands on a tiny model: what they print and write, and how a user's mistakes end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

import dsa as library
from dsa.ops import native_support

Run = Callable[..., Result]

SMALL = ("--top-k", "32", "--local", "8")
ROWS = (
    "perplexity",
    "ratio to dense",
    "attention mass kept",
    "tokens read per query",
    "prefill, seconds",
    "decode, tokens/s",
    "peak memory, MB",
)


def flat(text: str) -> str:
    """Text without the line breaks that fitting it to the terminal put in."""
    return " ".join(text.split())


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_the_comparison(dsa: Run, tiny: str, text: str, tmp_path: Path, command: str) -> None:
    out = tmp_path / "figures.json"
    model = (tiny,) if command == "eval" else ("--model", tiny)
    result = dsa(command, *model, "--file", text, "--tokens", "120", *SMALL, "--json", str(out), "--threads", "1")
    assert result.exit_code == 0, result.output
    for row in ROWS:
        assert row in result.stdout
    assert "UNTRAINED" in result.stdout
    assert "Continuation with DSA" in result.stdout
    assert "\x1b" not in result.output
    assert max(map(len, result.stdout.replace(tiny, "").replace(str(out), "").splitlines())) <= 80
    figures = json.loads(out.read_text())
    assert f"{figures['perplexity_dsa']:.3f}" in result.stdout
    assert (figures["model"], figures["document"], figures["environment"]["threads"]) == (tiny, text, 1)
    for step in ("DSA: prefill", "Attention mass", "Dense: prefill", "Window: decode"):
        assert step in result.stderr


def test_a_short_text_is_read_whole(dsa: Run, tiny: str, text: str) -> None:
    result = dsa("eval", tiny, "--file", text, "--top-k", "300", "--local", "8")
    assert result.exit_code == 0, result.output
    assert "reads 292 tokens" in result.stdout
    assert "nothing is left out" in flat(result.stdout)
    assert "68 positions lie beyond" in flat(result.stdout)
    assert result.stderr.count("note: 292 tokens are more than the 256 positions") == 1


def test_info_as_json(dsa: Run) -> None:
    said = json.loads(dsa("info", "--json").stdout)
    assert said["machine"]["torch"] == torch.__version__
    assert said["operations"]["index_topk"]["reference"].startswith("runs")


def test_info(dsa: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSA_CACHE", str(tmp_path / "cache"))
    result = dsa("info")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.stdout
    assert str(tmp_path / "cache") in result.stdout
    kernels = next(line for line in result.stdout.splitlines() if line.startswith("cpu kernels"))
    assert ("no: " in kernels) == (native_support.missing() is not None)
    for operation in (
        "index_projection",
        "quantize_index_keys",
        "index_topk",
        "sparse_attention",
        "dense_attention",
        "indexer_loss",
    ):
        assert f"{operation} " in result.stdout
    assert "runs" in result.stdout


def generated(folder: str, prompt: str, tokens: int) -> str:
    """What transformers itself makes of the prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_streams_the_continuation(dsa: Run, tiny: str) -> None:
    # with so few tokens everything is selected, and the output is the plain model's
    result = dsa("generate", tiny, "--prompt", "hello", "--max-new-tokens", "12", "--stats")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == generated(tiny, "hello", 12).rstrip("\n")
    assert "UNTRAINED" in result.stderr
    assert "5 tokens read" in result.stderr


def test_generate_reads_stdin_and_files(dsa: Run, tiny: str, text: str) -> None:
    options = ("--max-new-tokens", "4", *SMALL, "--indexers")
    folder = str(Path(text).parent / "indexers")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    library.attach(model, top_k=32, local=8)
    library.save_indexers(model, folder, trained=True)
    content = Path(text).read_text()[:100]
    Path(text).write_text(content)
    piped = dsa("generate", tiny, *options, folder, stdin=content)
    from_file = dsa("generate", tiny, *options, folder, "--file", text)
    dashed = dsa("generate", tiny, *options, folder, "--file", "-", stdin=content)
    split = dsa("generate", tiny, *options, folder, "--file", text, "--prompt", "")
    assert piped.exit_code == 0, piped.output
    assert piped.stdout == from_file.stdout == dashed.stdout == split.stdout
    assert "100 tokens read" in piped.stderr
    assert "UNTRAINED" not in piped.stderr


def test_a_question_follows_the_file(dsa: Run, tiny: str, text: str) -> None:
    Path(text).write_text("Some words.")
    asked = dsa("generate", tiny, "--file", text, "--ask", " Which? ", "--max-new-tokens", "4")
    prompted = dsa("generate", tiny, "--prompt", "Some words.\n\nQuestion: Which?\nAnswer:", "--max-new-tokens", "4")
    assert asked.exit_code == 0, asked.output
    assert asked.stdout == prompted.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--ask", "Which?"), "there is no document to ask about"),
        (("--ask", " ", "--file", "a.txt"), "the question is empty"),
        (("--ask", "Which?", "--prompt", "So", "--file", "a.txt"), "got a prompt too"),
    ],
)
def test_refused_questions(dsa: Run, tiny: str, arguments: tuple[str, ...], expected: str) -> None:
    result = dsa("generate", tiny, *arguments)
    assert expected in flat(f"{result.output} {result.exception}")
    assert result.exit_code != 0


def test_sampling_is_repeatable(dsa: Run, tiny: str) -> None:
    options = ("--prompt", "hello", "--max-new-tokens", "16", "--temperature", "1.5")
    first = dsa("generate", tiny, *options, "--seed", "1").stdout
    assert first == dsa("generate", tiny, *options, "--seed", "1").stdout
    assert first != dsa("generate", tiny, *options, "--seed", "2").stdout


def test_a_saved_attached_model(dsa: Run, tiny: str, text: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    library.attach(model, top_k=24, local=4)
    folder = str(tmp_path / "attached")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    own = dsa("generate", folder, "--prompt", "hello", "--max-new-tokens", "4", "--stats")
    assert "reads 24 tokens per query" in own.stderr
    changed = dsa("generate", folder, "--prompt", "hello", "--max-new-tokens", "4", "--top-k", "16", "--stats")
    assert "reads 16 tokens per query" in changed.stderr
    evaluated = dsa("eval", folder, "--file", text, "--tokens", "100")
    assert evaluated.exit_code == 0, evaluated.output
    assert "DSA, K = 24" in evaluated.stdout


def test_chat(dsa: Run, tiny: str, tmp_path: Path) -> None:
    refused = dsa("generate", tiny, "--prompt", "hello", "--chat")
    assert refused.exit_code == 2
    assert "has no chat template" in refused.stderr
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    folder = str(tmp_path / "chat")
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = dsa("generate", folder, "--prompt", "hello", "--chat", "--max-new-tokens", "4")
    assert "11 tokens read" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "{tiny}", "--file", "{folder}/missing.txt"], "file: there is no file"),
        (["eval", "{tiny}", "--file", "{folder}"], "is a directory"),
        (["eval", "{tiny}", "--file", "{folder}/empty.txt"], "is empty"),
        (["eval", "{tiny}", "--file", "{folder}/binary.txt"], "is not UTF-8 text"),
        (["eval", "{tiny}", "--file", "{folder}/one.txt"], "has 1 token(s); at least 2"),
        (["eval", "{tiny}", "--file", "{text}", "--tokens", "1000"], "has only 324 tokens, 1,000 were asked for"),
        (["eval", "{tiny}", "--file", "{text}", "--tokens", "1"], "tokens must be at least 2"),
        (["eval", "{tiny}", "--file", "{text}", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["eval", "{tiny}", "--file", "{text}", "--top-k", "100"], "raise --top-k to 260 or lower local"),
        (["eval", "{tiny}", "--file", "{text}", "--json", "{folder}"], "json: {folder} is a directory"),
        (["eval", "{tiny}", "--file", "{text}", "--json", "{folder}/no/out.json"], "there is no directory"),
        (["eval", "{tiny}", "--file", "{text}", "--indexers", "{folder}/none"], "indexers: no file at"),
        (["eval", "{tiny}", "--file", "{text}", "--indexers", "{text}"], "only .safetensors files"),
        (["eval", "{folder}", "--file", "{text}"], "without config.json"),
        (["eval", "./nowhere", "--file", "{text}"], "there is no directory ./nowhere"),
        (["demo", "--model", "{text}"], "is a file; expected a GGUF file, a directory"),
        (["generate", "{tiny}"], "the prompt is empty"),
        (["generate", "{tiny}", "--prompt", " "], "the prompt is empty"),
        (["generate", "{tiny}", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["generate", "{tiny}", "--prompt", "x", "--device", "toaster"], "device: expected 'cpu', 'cuda'"),
        (["generate", "{tiny}", "--prompt", "x", "--device", "cuda:99"], "finds no cuda:99 here"),
    ],
)
def test_mistakes(dsa: Run, tiny: str, text: str, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "one.txt").write_text("a")
    names = {"tiny": tiny, "text": text, "folder": str(tmp_path)}
    result = dsa(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert expected.format(**names) in flat(result.stderr.replace("│", " "))
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_the_place_for_the_json_is_checked_first(
    dsa: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsa.models.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert dsa("demo", "--model", tiny, "--json", str(tmp_path / "no" / "out.json")).exit_code == 2


def failing(error: BaseException) -> Callable[..., None]:
    def load(*arguments: object, **options: object) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError("DefaultCPUAllocator: can't allocate memory"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1),
        (ImportError("the default model is not installed: run `make install`"), 2),
    ],
)
def test_how_it_ends(
    dsa: Run, tiny: str, text: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    monkeypatch.setattr("dsa.models.loading.load_model", failing(error))
    result = dsa("eval", tiny, "--file", text)
    assert result.exit_code == code
    assert str(error) in flat(result.stderr)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug")])
def test_our_bugs_are_not_hidden(
    dsa: Run, tiny: str, text: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("dsa.models.loading.load_model", failing(error))
    assert dsa("eval", tiny, "--file", text).exception is error


def test_debugging_shows_where(dsa: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSA_DEBUG", "1")
    result = dsa("eval", tiny, "--file", "missing.txt")
    assert isinstance(result.exception, FileNotFoundError)
