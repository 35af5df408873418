"""`dsa train` on a dense model with latent attention, `dsa export`, and the DeepSeek-V3.2 that comes out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

SIZES = ("--index-heads", "4", "--index-head-dim", "16", "--top-k", "16")
SHORT = ("--seq-len", "48", "--queries-per-update", "8", "--threads", "1", "--device", "cpu", "--steps", "1")


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "v3"
    tiny_model("deepseek_v3", vocab_size=BYTE_VOCABULARY).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_trained_in_both_stages_and_exported(
    dsa: Callable[..., Result], latent: str, text: str, tmp_path: Path
) -> None:
    warmup, sparse, out = (str(tmp_path / name) for name in ("warmup", "sparse", "out"))
    told = tmp_path / "told.json"
    result = dsa(
        "train", latent, "--data", text, "--out", warmup, *SIZES, *SHORT, "--start", "fitted", "--json", str(told)
    )
    assert result.exit_code == 0, result.output
    trained = json.loads(told.read_text())
    assert (trained["step"], trained["settings"]["steps"], sorted(trained["kl"])) == (1, 1, ["0", "1"])
    assert trained["indexers"] == str(Path(warmup) / "indexers.safetensors")
    assert "DeepseekV3ForCausalLM: 2 indexers" in result.stderr
    result = dsa("export", latent, "--indexers", warmup, "--out", out, "--json", str(told))
    assert result.exit_code == 0, result.output
    assert json.loads(told.read_text())["written"] == out
    assert [each["top_k"] for each in json.loads(told.read_text())["layers"]] == [16, 16]
    config = json.loads((Path(out) / "config.json").read_text())
    assert (config["architectures"], config["index_topk"]) == (["DeepseekV32ForCausalLM"], 16)
    # Computed in fp32, written as it was.
    assert config["dtype"] == "bfloat16"
    more = ("--stage", "sparse", "--indexers", warmup, "--lora", "2", "--merge")
    result = dsa("train", latent, "--data", text, "--out", sparse, *SHORT, *more)
    assert result.exit_code == 0, result.output
    again = str(tmp_path / "again")
    result = dsa("export", f"{sparse}/model", "--out", again)
    assert result.exit_code == 0, result.output
    result = dsa("generate", again, "--prompt", "What is kept?", "--max-new-tokens", "3", "--device", "cpu", "--stats")
    assert result.exit_code == 0, result.output
    assert "DeepseekV32Attention replaced by LatentAttention" in result.stderr


def test_mistakes(dsa: Callable[..., Result], latent: str, tiny: str, tmp_path: Path) -> None:
    for arguments, message in (
        ((latent, "--out", str(tmp_path)), "has no indexers; train some with"),
        ((tiny, "--out", latent), "is there already and not an empty folder"),
    ):
        result = dsa("export", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output
