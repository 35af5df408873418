"""`dsa bench` at tiny sizes: what it prints, writes and refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

from dsa.bench import agreement, llamacpp
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

Run = Callable[..., Result]

OPS = ("machine", "decode", "prefill", "memory", "index", "crossover", "loss", "quantize")


def flat(text: str) -> str:
    """Text without the line breaks that fitting it to the terminal put in."""
    return " ".join(text.split())


def test_all_operations(dsa: Run, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = dsa("bench", "ops", "--quick", "--data", "gaussian", "--json", str(out), "--threads", "1")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert tuple(dict.fromkeys(row["name"] for row in rows)) == OPS
    for row in rows:
        assert row["environment"]["threads"] == 1
        assert {"commit", "machine", "isa", "torch", "implementations", "date"} <= set(row["environment"])
        assert row["checks"] or row["name"] == "machine"
        assert row["name"] in result.stdout
    assert "SDPA / DSA" in result.stdout
    assert "Checked against the reference" in result.stdout
    assert max(map(len, result.stdout.replace(str(out), "").splitlines())) <= 80
    assert "\x1b" not in result.output


def test_tensors_recorded_from_a_model(dsa: Run, tiny: str) -> None:
    options = ("--quick", "--only", "prefill", "--data", "recorded", "--lengths", "100", "--model", tiny)
    result = dsa("bench", "ops", *options)
    assert result.exit_code == 0, result.output
    assert "prefill, n = 100, recorded" in result.stdout
    assert f"of {tiny} reading the Python language reference" in flat(result.stdout)


def test_results_are_merged_and_shown(dsa: Run, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    common = ("bench", "ops", "--quick", "--only", "prefill", "--data", "gaussian", "--json", str(out))
    for lengths in ("64,96", "96,128"):
        assert dsa(*common, "--lengths", lengths).exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["length"] for row in rows] == [64, 96, 128]
    shown = dsa("bench", "show", str(out))
    assert shown.exit_code == 0, shown.output
    for length in (64, 96, 128):
        assert f"prefill, n = {length}, gaussian" in shown.stdout


def test_targets_are_shown_next_to_figures(dsa: Run, tmp_path: Path) -> None:
    out, targets = tmp_path / "results.json", tmp_path / "targets.json"
    asked = {"row": "prefill", "case": "n = 64, gaussian", "figure": "SDPA / DSA"}
    wrong = {"row": "prefill", "case": "n = 64, gaussian", "figure": "speed", "at_least": 1}
    targets.write_text(json.dumps({"format": "dsa bench targets 1", "targets": [asked | {"at_most": 0.0}, wrong]}))
    command = ("bench", "ops", "--quick", "--only", "prefill", "--data", "gaussian", "--lengths", "64,96")
    plain = dsa(*command, "--json", str(out))
    assert "missed" not in plain.stdout
    assert "target" not in out.read_text()
    result = dsa(*command, "--json", str(out), "--targets", str(targets))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("<= 0x missed") == 1
    assert "targets: the row prefill, n = 64, gaussian has no figure 'speed'" in flat(result.stderr)
    assert "<= 0x missed" in dsa("bench", "show", str(out)).stdout
    targets.write_text(json.dumps({"format": "dsa bench targets 1", "targets": [asked | {"at_least": 0.0}]}))
    shown = dsa("bench", "show", str(out), "--targets", str(targets)).stdout
    assert ">= 0x" in shown
    assert "missed" not in shown


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_curves(dsa: Run, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"curves.{ending}"
    options = ("--quick", "--only", "prefill", "--data", "gaussian", "--plot", str(out))
    result = dsa("bench", "ops", *options, "--lengths", "64,96")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
    alone = dsa("bench", "ops", *options, "--lengths", "64")
    assert "No curves to draw" in alone.stdout


def test_nothing_is_printed_where_results_disagree(dsa: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agreement, "_attend", lambda tensors, row, positions: torch.ones(9, 64).double())
    out = tmp_path / "results.json"
    options = ("--quick", "--only", "prefill", "--data", "gaussian", "--json", str(out))
    result = dsa("bench", "ops", *options)
    assert result.exit_code == 1
    assert "differs from the reference" in flat(result.stderr)
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ops", "--only", "nothing"], "only: expected machine, decode,"),
        (["ops", "--lengths", "many"], "lengths: expected numbers of at least 2 tokens"),
        (["ops", "--lengths", "0"], "lengths: expected numbers of at least 2 tokens"),
        (["ops", "--data", "invented"], "data: expected recorded or gaussian"),
        (["ops", "--json", "{folder}"], "json: {folder} is a directory"),
        (["ops", "--json", "{folder}/other.json"], "holds no results of `dsa bench`"),
        (["ops", "--json", "{folder}/text.json"], "is not JSON"),
        (["ops", "--plot", "{folder}/curves.txt"], "plot: expected a file name that ends in"),
        (["ops", "--plot", "{folder}/no/curves.svg"], "plot: there is no directory"),
        (["ops", "--threads", "0"], "threads"),
        (["show", "{folder}/missing.json"], "No such file"),
        (["ops", "--targets", "{folder}/missing.json"], "No such file"),
        (["e2e", "--targets", "{folder}/text.json"], "targets: {folder}/text.json is not JSON"),
        (
            ["show", "{folder}/missing.json", "--targets", "{folder}/other.json"],
            'expected {{"format": "dsa bench targets',
        ),
    ],
)
def test_mistakes(
    dsa: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dsa.bench.suites.run", lambda *args: pytest.fail("something was measured"))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "text.json").write_text("not JSON")
    result = dsa("bench", *(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert expected.format(folder=tmp_path) in flat(result.stderr.replace("│", " "))
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_plot_without_matplotlib(dsa: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = dsa("bench", "ops", "--quick", "--plot", str(tmp_path / "curves.svg"))
    assert result.exit_code == 2
    assert "pip install 'dsa-attention[plot]'" in flat(result.stderr)


def test_whole_models(dsa: Run, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = dsa("bench", "e2e", "--quick", "--model", tiny, "--json", str(out), "--threads", "1")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    cases = [(row["name"], row["case"]) for row in rows]
    assert cases == [
        ("short", "n = 24"),
        ("prompt", "n = 96"),
        ("decode", "64 cached"),
        ("decode", "128 cached"),
        ("decode", "growth from 64 to 128"),
        ("llamacpp", ""),
    ]
    for row in rows[:-1]:
        assert any("logits with all selected" in check for check in row["checks"])
        assert row["figures"]
    assert "Skipped: the model is not the default one" in flat(result.stdout)
    assert "decode, SDPA / DSA" in result.stdout
    assert max(map(len, result.stdout.replace(str(out), "").splitlines())) <= 80


@pytest.fixture(scope="session")
def born(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tiny GLM-5, whose second layer shares the first one's selection."""
    folder = tmp_path_factory.mktemp("models") / "glm"
    born_model("glm_moe_dsa", vocab_size=BYTE_VOCABULARY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_born_with_dsa(dsa: Run, born: str, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = dsa("bench", "e2e", "--quick", "--model", born, "--json", str(out), "--threads", "1")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["short", "prompt", "decode", "decode", "decode", "llamacpp"]
    for row in rows[:-1]:
        assert "logits with all selected" in row["checks"][0]
        assert row["checks"][1] == "selection equal in 2 layers"
        assert row["checks"][2] == "first choice equal at 16 of 16 positions"
        assert (row["shape"]["born_with_dsa"], row["shape"]["top_k"]) == (True, 8)
        assert not any("target" in figure for figure in row["figures"])
    assert "transformers' path through it" in flat(result.stdout)


def test_prompts_that_transformers_cannot_read(dsa: Run, born: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.bench.caches.available_memory", lambda device: 3 * 10**9)
    command = ("bench", "e2e", "--quick", "--only", "prompt", "--model", born)
    assert dsa(*command, "--lengths", "64").exit_code == 0
    result = dsa(*command, "--lengths", "64,4096")
    assert result.exit_code == 2
    assert "transformers scores all pairs of 4,096 tokens at once and would take 5 GB, 3 GB are free" in flat(
        result.stderr
    )


def test_no_figures_where_a_layer_selects_something_else(
    dsa: Run, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dsa.bench.pair.index_topk", lambda *args, **options: torch.zeros(1))
    result = dsa("bench", "e2e", "--quick", "--only", "prompt", "--model", tiny)
    assert result.exit_code == 1
    assert "selects other tokens than the reference" in flat(result.stderr)
    assert result.stdout == ""


def test_caches_that_do_not_fit_are_refused(dsa: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa.bench.caches.available_memory", lambda device: 10**9)
    result = dsa("bench", "e2e", "--quick", "--only", "decode", "--model", tiny)
    assert result.exit_code == 2
    assert "name fewer or shorter ones with --lengths" in flat(result.stderr)


def test_llama_cpp_is_asked_for_and_compared(
    dsa: Run, monkeypatch: pytest.MonkeyPatch, tiny: str, tmp_path: Path
) -> None:
    """The peer itself is not needed here: a stand-in answers as its process would."""
    asked = []

    def ask(ids: torch.Tensor, checked: int, decoded: int, flash: bool, python: str | None) -> dict[str, object]:
        asked.append(flash)
        seconds = 20.0 if flash else 30.0
        return {
            "prefill_s": seconds,
            "decode_s": [1.0] * decoded,
            "after_check": continuation(ids, checked),
            "version": "1",
            "system": "AVX2",
        }

    def continuation(ids: torch.Tensor, checked: int) -> int:
        model = AutoModelForCausalLM.from_pretrained(tiny)
        return int(model(ids[:, :checked]).logits[0, -1].argmax()) if right else -1

    monkeypatch.setattr(llamacpp, "DEFAULT_MODEL", tiny)
    monkeypatch.setattr(llamacpp, "missing", lambda python: None)
    monkeypatch.setattr(llamacpp, "_ask", ask)
    right = True
    command = ("bench", "e2e", "--quick", "--only", "llamacpp", "--model", tiny)
    result = dsa(*command, "--json", str(tmp_path / "results.json"))
    assert result.exit_code == 0, result.output
    assert asked == [True, False]
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    prefill = row["figures"][0]
    assert prefill["value"] == pytest.approx(20.0 / row["timings"]["DSA prefill"]["median_s"])
    right = False
    wrong = dsa(*command)
    assert wrong.exit_code == 1
    assert wrong.stdout == ""


def test_an_interpreter_without_llama_cpp(dsa: Run, tmp_path: Path) -> None:
    result = dsa("bench", "e2e", "--llama-python", str(tmp_path / "python"))
    assert result.exit_code == 2
    assert "pip install llama-cpp-python there" in flat(result.stderr)
