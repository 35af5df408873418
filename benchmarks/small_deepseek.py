#!/usr/bin/env python3
"""A small DeepSeek-V3.2 made by this project's trainer: dense pre-training, warm-up, sparse stage, export, measures.

    python scripts/fetch_training_text.py --out text
    python benchmarks/small_deepseek.py --train text/train/*.txt --heldout text/heldout/*.txt --work runs/small \
        --json benchmarks/results/DATE-small-deepseek.json

A DeepSeek-V3 (latent attention, shared and routed experts, group-limited routing) of 2.5M weights learns language
from random weights, gets indexers, and goes through both stages of `dsa train`. Beside the sparse stage its dense
continuation reads the same windows in the same order from the same checkpoint. What comes out is written as
`DeepseekV32ForCausalLM`.

Every stage is a `dsa train` of its own, whose run stays in WORK: a run that was cut goes on with the same command, and
stages that are finished are not done again. `--stages` runs some of them only. Text never leaves WORK.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SEQ_LEN, TOP_K = 1024, 128
VOCABULARY = 2048
SEED = 0

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": 96,
    # The width of a group of FP8 rows.
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 4096,
    "num_mtp_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

COMMON = ("--seq-len", str(SEQ_LEN), "--seed", str(SEED), "--device", "cpu", "--checkpoint-every", "20")
CONTINUED = ("--steps", "150", "--sequences", "4", "--lr", "3e-4", "--warmup-steps", "10", "--holdout-every", "150")
"""What the sparse stage and the dense continuation have in common: the same windows, steps and learning rates."""

STAGES: dict[str, tuple[str, ...]] = {
    "dense": (
        *("config", "--stage", "dense", "--from-scratch", "--expert-bias-rate", "0.001"),
        *("--steps", "700", "--sequences", "4", "--lr", "2e-3", "--warmup-steps", "40", "--holdout-every", "100"),
    ),
    "warmup": (
        *("dense/model", "--stage", "warmup", "--top-k", str(TOP_K), "--index-heads", "16", "--index-head-dim", "32"),
        *("--steps", "240", "--sequences", "1", "--lr", "5e-3", "--holdout-every", "60"),
    ),
    "sparse": (
        *("dense/model", "--stage", "sparse", "--indexers", "warmup", "--all-parameters", "--indexer-lr", "1e-3"),
        *CONTINUED,
    ),
    "continued": ("dense/model", "--stage", "dense", *CONTINUED),
}
"""Arguments of `dsa train` by stage; folders are those under WORK."""


def prepare(work: Path, texts: list[str], heldout: list[str]) -> None:
    """Configuration, tokenizer and tokens, where they are not there yet."""
    from transformers import DeepseekV3Config

    scripts = Path(__file__).resolve().parent.parent / "scripts"
    config = work / "config"
    if not (config / "config.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        command = [scripts / "train_tokenizer.py", *texts, "--vocabulary", VOCABULARY, "--out", config]
        _python(command)
        DeepseekV3Config(**SIZES, architectures=["DeepseekV3ForCausalLM"]).save_pretrained(config)
    for name, files in (("train", texts), ("heldout", heldout)):
        if not (work / f"{name}.safetensors").exists():
            _python([scripts / "tokenize_text.py", config, *files, "--out", work / f"{name}.safetensors"])


def run_stage(work: Path, name: str, threads: int) -> None:
    """One `dsa train`, from its last checkpoint where it has one."""
    out = work / name
    model, *given = STAGES[name]
    given = [str(work / each) if last == "--indexers" else each for last, each in zip(("", *given), given)]
    resume = ["--resume"] if (out / "state.safetensors").exists() else []
    data = ["--data", work / "train.safetensors", "--holdout", work / "heldout.safetensors"]
    sizes = ["--holdout-sequences", 8, "--threads", threads, "--out", out]
    _python(["-m", "dsa", "train", work / model, *given, *COMMON, *data, *sizes, *resume])


def _python(arguments: list[object]) -> None:
    print("+ python", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help="text to learn from")
    parser.add_argument("--heldout", nargs="+", required=True, metavar="FILE", help="text to measure on")
    parser.add_argument("--work", type=Path, required=True, metavar="WORK", help="folder for everything that is made")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of the training (default: 2)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="run these (default: all)")
    given = parser.parse_args()
    prepare(given.work, given.train, given.heldout)
    for name in given.stages:
        run_stage(given.work, name, given.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
