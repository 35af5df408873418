"""`dsa read`, `dsa store` and the second question of `dsa generate`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from dsa.config import DSAConfig
from dsa.models.attachment import attach
from dsa.models.checkpoint import save_indexers
from dsa.models.loading import load_model

Run = Callable[..., Result]
FEW = ("--max-new-tokens", "4", "--rope-scaling", "yarn:8")


@pytest.fixture(scope="session")
def indexers(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with indexers for the tiny model."""
    loaded = load_model(tiny)
    attach(loaded.model, DSAConfig(top_k=32, index_heads=2, index_head_dim=8, sinks=1, local=8))
    file = tmp_path_factory.mktemp("indexers") / "indexers.safetensors"
    return str(save_indexers(loaded.model, file, trained=True))


@pytest.fixture
def long(tmp_path: Path) -> str:
    """A text file of about 1,300 tokens, a byte each."""
    file = tmp_path / "long.txt"
    file.write_text("".join(f"Line {number} says {number * number}. " for number in range(70)))
    return str(file)


def test_read_ask_list_and_remove(dsa: Run, tiny: str, indexers: str, long: str, tmp_path: Path) -> None:
    given = ("--indexers", indexers)
    store, figures = ("--store", str(tmp_path / "store")), tmp_path / "figures.json"
    read = dsa("read", tiny, "--file", long, "--rope-scaling", "yarn:8", *given, *store)
    assert read.exit_code == 0, read.output
    assert "long.txt: kept 1," in read.stdout
    assert "are kept already" in dsa("read", tiny, "--file", long, "--rope-scaling", "yarn:8", *given, *store).stdout
    asked = ("generate", tiny, "--file", long, "--ask", "Which?", *FEW, *given)
    without = dsa(*asked, "--no-store")
    opened = dsa(*asked, *store, "--json", str(figures))
    assert opened.exit_code == 0, opened.output
    assert opened.stdout == without.stdout
    assert "opened 1," in opened.stderr
    assert "reading them took" in opened.stderr
    written = json.loads(figures.read_text())
    assert written["tokens_opened"] > 1000 > written["tokens_read"]
    assert written["first_token_s"] > 0
    assert written["token_ms"] > 0
    [entry] = json.loads(dsa("store", "list", "--json", *store).stdout)["entries"]
    assert entry["tokens"] == written["tokens_opened"]
    assert entry["document"] == "long.txt"
    assert "long.txt" in dsa("store", "list", *store).stdout
    assert "dsa.top_k: 32" in dsa("store", "show", entry["name"][:4], *store).stdout
    other = dsa("store", "show", entry["name"], "--model", tiny, *given, *store)
    assert "config.rope_parameters" in other.stdout.rpartition("differs in:")[2]
    assert f"{entry['name']}: as it was written" in dsa("store", "verify", *store).stdout
    assert dsa("store", "remove", "nothing", *store).exit_code == 2
    assert f"removed {entry['name']}" in dsa("store", "remove", entry["name"], *store).stdout
    assert "nothing is kept" in dsa("store", "list", *store).stdout
    assert "removed 0 entries" in dsa("store", "prune", *store).stdout


def test_a_file_is_no_store(dsa: Run, tiny: str, long: str) -> None:
    refused = dsa("generate", tiny, "--file", long, *FEW, "--store", long)
    assert refused.exit_code == 2
    assert "is not a directory" in refused.stderr
