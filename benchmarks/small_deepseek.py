#!/usr/bin/env python3
"""A small DeepSeek-V3.2 made by this project's trainer: dense pre-training, warm-up, sparse stage, export, measures.

    python scripts/fetch_training_text.py --out text
    python benchmarks/small_deepseek.py --train text/train/*.txt --heldout text/heldout/*.txt --work runs/small \
        --json benchmarks/results/DATE-small-deepseek.json

A DeepSeek-V3 (latent attention, shared and routed experts, group-limited routing) of 2.5M weights learns language
from random weights, gets indexers, and goes through both stages of `dsa train`. Next to the sparse stage its dense
continuation reads the same windows in the same order from the same checkpoint. What comes out is written as
`DeepseekV32ForCausalLM`.

Every stage is a `dsa train` of its own, whose run stays in WORK: a run that was cut goes on with the same command, and
stages that are finished are not done again. `--stages` runs some of them only. Text never leaves WORK.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, PreTrainedModel

import dsa
from dsa.bench.result import environment
from dsa.models import config_of
from dsa.models.context import AttentionCall, DSAContext
from dsa.ops import pack_latents, sparse_attention
from dsa.runs.files import write_json
from dsa.train import Holdout, TokenStream, Windows, read_data

SEQ_LEN, TOP_K = 1024, 128
VOCABULARY = 2048
SEED = 0
POSITIONS = 4096
"""Held-out positions on which logits are compared."""
MASS_SEQUENCES = 32
POINTS = 50
"""Of a loss curve in the record."""

SIZES: dict[str, Any] = {
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
    # As wide as queries and keys: torch's fused attention on a CPU wants them equal.
    "v_head_dim": 48,
    "max_position_embeddings": 4096,
    "num_mtp_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

COMMON = ("--seq-len", str(SEQ_LEN), "--seed", str(SEED), "--device", "cpu", "--checkpoint-every", "20")
CONTINUED = ("--steps", "100", "--sequences", "4", "--lr", "3e-4", "--warmup-steps", "10", "--holdout-every", "100")
"""What the sparse stage and the dense continuation have in common: the same windows, steps and learning rates."""

STAGES: dict[str, tuple[str, ...]] = {
    "dense": (
        *("config", "--stage", "dense", "--from-scratch", "--expert-bias-rate", "0.001"),
        *("--steps", "800", "--sequences", "4", "--lr", "3e-3", "--warmup-steps", "40", "--holdout-every", "100"),
    ),
    "warmup": (
        *("dense/model", "--stage", "warmup", "--top-k", str(TOP_K), "--index-heads", "16", "--index-head-dim", "32"),
        *("--steps", "192", "--sequences", "1", "--lr", "5e-3", "--holdout-every", "96"),
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
    """One `dsa train`, from its last checkpoint where it has one; nothing where it is finished."""
    out = work / name
    model, *given = STAGES[name]
    if (out / "log.jsonl").exists() and log_of(out)[-1]["step"] == int(given[given.index("--steps") + 1]):
        return
    given = [str(work / each) if last == "--indexers" else each for last, each in zip(("", *given), given)]
    resume = ["--resume"] if (out / "state.safetensors").exists() else []
    data = ["--data", work / "train.safetensors", "--holdout", work / "heldout.safetensors"]
    sizes = ["--holdout-sequences", 8, "--threads", threads, "--out", out]
    _python(["-m", "dsa", "train", work / model, *given, *COMMON, *data, *sizes, *resume])


def _python(arguments: list[object]) -> None:
    print("+ python", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def export(work: Path) -> Path:
    """The trained model as a DeepSeek-V3.2, written once."""
    folder = work / "v32"
    if not (folder / "config.json").exists():
        _python(["-m", "dsa", "export", work / "sparse" / "model", "--out", folder])
    return folder


def keep(folder: Path, target: Path) -> None:
    """The exported model in fp16, small enough to be a test's model; with its tokenizer."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)


def log_of(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def curve(log: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Mean loss of every so many steps, at most `POINTS` of them: `[tokens read, nats]`."""
    some = -(-len(log) // POINTS)
    parts = [log[begin : begin + some] for begin in range(0, len(log), some)]
    return [[part[-1]["tokens"], round(sum(line[name] for line in part) / len(part), 4)] for part in parts]


def stage_record(work: Path, name: str) -> dict[str, Any]:
    """What one stage did: its arguments, tokens, time, losses, and held-out text."""
    log = log_of(work / name)
    curves = {loss: curve(log, loss) for loss in ("language", "kl_mean") if loss in log[0]}
    done = {"steps": log[-1]["step"], "tokens": log[-1]["tokens"], "seconds": round(log[-1]["seconds"])}
    return {
        "arguments": " ".join([*STAGES[name], *COMMON]),
        **done,
        "curves": curves,
        "holdout": log_of(work / name, "holdout.jsonl"),
    }


def loss_ratio(work: Path) -> dict[str, float]:
    """Losses of the sparse stage over those of the dense continuation, on the same windows."""
    sparse, dense = (log_of(work / name) for name in ("sparse", "continued"))
    assert [line["tokens"] for line in sparse] == [line["tokens"] for line in dense]
    last = len(sparse) // 3
    losses = [[line["language"] for line in log] for log in (sparse, dense)]
    held = [log_of(work / name, "holdout.jsonl")[-1] for name in ("sparse", "continued")]
    means = {"all_steps": slice(None), f"last_{last}_steps": slice(-last, None)}
    found: dict[str, float] = {}
    for name, some in means.items():
        ours, theirs = (sum(log[some]) / len(log[some]) for log in losses)
        found |= {f"sparse_{name}": ours, f"dense_{name}": theirs, f"ratio_{name}": ours / theirs}
    found["largest_ratio_of_a_step"] = max(ours / theirs for ours, theirs in zip(*losses))
    return found | {"ratio_heldout": held[0]["sparse"] / held[1]["dense"]}


def mass_kept(work: Path, stream: TokenStream, sequences: int) -> dict[str, Any]:
    """Attention mass on the selection and on the best one, by layer, on held-out text."""
    model = AutoModelForCausalLM.from_pretrained(work / "sparse" / "model", dtype=torch.float32).eval()
    record = Holdout.of(stream, SEQ_LEN, sequences).measure(model, config_of(model), 0)
    shares = {layer: record.mass[layer] / record.oracle[layer] for layer in record.mass}
    mean = sum(record.mass.values()) / sum(record.oracle.values())
    return {**record.to_dict(), "sequences": sequences, "mass_over_oracle": shares, "mass_over_oracle_mean": mean}


PLAIN = """
import sys
sys.modules["dsa"] = None  # any import of it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, given = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
with torch.no_grad():
    logits = [model(ids[None], use_cache=False).logits for ids in load_file(given)["ids"]]
save_file({"logits": torch.cat(logits), "class": torch.tensor(list(type(model).__name__.encode()))}, given)
"""


def plain_logits(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Logits of plain transformers in a process without this package, and the class it loads."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "given.safetensors"
        save_file({"ids": ids}, file)
        _python(["-c", PLAIN, folder, file])
        found = load_file(file)
    return found["logits"], bytes(found["class"].tolist()).decode()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    return torch.cat([model(each[None], **given).logits for each in ids])


class RowError:
    """An observer: what a layer's attention gives with FP8 rows in the place of bf16 ones, all else the same.

    Compared are the rows that the heads mixed, the values that come out of them, and the layer's output.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sums: dict[int, torch.Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        indices = call.indices
        assert indices is not None
        layer = self.model.model.layers[call.layer].self_attn
        latent = self.model.config.kv_lora_rank
        up_value = layer.kv_b_proj.weight.unflatten(0, (layer.heads, -1))[:, layer.nope_dim :]

        def outputs(key: Any, value: Any) -> tuple[torch.Tensor, ...]:
            mixed, _ = sparse_attention(call.query, key, value, indices, scale=call.scale)
            values = torch.einsum("bthl,hvl->bthv", mixed, up_value)
            return mixed, values, layer.o_proj(values.flatten(2))

        rows = call.key.bfloat16().to(call.query.dtype)
        packed = pack_latents(call.key.squeeze(2), latent)
        pairs = zip(outputs(packed, None), outputs(rows, rows[..., :latent]))
        squares = [[(ours - theirs).double().square().sum(), theirs.double().square().sum()] for ours, theirs in pairs]
        self.sums[call.layer] = self.sums.get(call.layer, 0) + torch.tensor(squares)

    def errors(self, what: int) -> dict[int, float]:
        """Relative error by layer, over all positions: of rows mixed (0), values (1) or outputs (2)."""
        return {layer: float((sums[what, 0] / sums[what, 1]).sqrt()) for layer, sums in self.sums.items()}


def fp8_rows(folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """How far FP8 rows move attention and predictions of the exported model, against bf16 latents."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dsa.accelerate(model)
    errors = RowError(model)
    for each in ids:
        with torch.no_grad():
            model(each[None], use_cache=False, dsa_context=DSAContext(observer=errors))
    exact = logits_of(model, ids, use_cache=True)
    hooks = [
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda module, args, out: out.bfloat16().to(out.dtype))
        for layer in model.model.layers
    ]
    narrow = logits_of(model, ids, use_cache=True)
    for hook in hooks:
        hook.remove()
    dsa.restore(model)
    dsa.accelerate(model, cache="fp8")
    found = logits_of(model, ids, use_cache=True)

    def same(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.argmax(dim=-1) == b.argmax(dim=-1)).double().mean())

    size = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    return {
        "positions": ids.numel(),
        "row": f"{size[0]} latent dims and {size[1]} with RoPE",
        "error_of_attention_output_by_layer": errors.errors(2),
        "error_of_values_by_layer": errors.errors(1),
        "error_of_mixed_rows_by_layer": errors.errors(0),
        "same_top_token_as_bf16": same(found, narrow),
        "same_top_token_as_fp32": same(found, exact),
        "same_top_token_bf16_as_fp32": same(narrow, exact),
    }


def measure(work: Path, texts: list[str]) -> dict[str, Any]:
    """Everything that is reported of the run in WORK."""
    folder = export(work)
    heldout = read_data([work / "heldout.safetensors"], None, VOCABULARY)
    windows = Windows(heldout, SEQ_LEN, SEED, boundaries=False)
    ids = windows(0, POSITIONS // SEQ_LEN).ids
    attached = AutoModelForCausalLM.from_pretrained(work / "sparse" / "model", dtype=torch.float32).eval()
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dsa.accelerate(native)
    plain, name = plain_logits(folder, ids)
    agreement = {
        "class": name,
        "attached_and_plain": float((logits_of(attached, ids, use_cache=False) - plain).abs().max()),
        "accelerated_and_plain": float((logits_of(native, ids, use_cache=False) - plain).abs().max()),
    }
    stages = {name: stage_record(work, name) for name in STAGES}
    made = [stages[name] for name in ("dense", "warmup", "sparse")]
    return {
        "format": "dsa small-deepseek 1",
        "sizes": SIZES,
        "weights": sum(each.numel() for each in native.parameters()),
        "top_k": TOP_K,
        "seq_len": SEQ_LEN,
        "texts": [Path(each).name for each in texts],
        "tokens_seen": sum(each["tokens"] for each in made),
        "seconds": sum(each["seconds"] for each in made),
        "seconds_with_continuation": sum(each["seconds"] for each in stages.values()),
        "loss": loss_ratio(work),
        "mass": mass_kept(work, heldout, MASS_SEQUENCES),
        "largest_difference_of_logits": agreement,
        "fp8": fp8_rows(folder, ids),
        "stages": stages,
        "environment": environment(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help="text to learn from")
    parser.add_argument("--heldout", nargs="+", required=True, metavar="FILE", help="text to measure on")
    parser.add_argument("--work", type=Path, required=True, metavar="WORK", help="folder for everything that is made")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of the training (default: 2)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="run these (default: all)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="measure, and write everything to this file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the model in fp16 to this folder")
    given = parser.parse_args()
    prepare(given.work, given.train, given.heldout)
    for name in given.stages:
        run_stage(given.work, name, given.threads)
    if given.keep is not None:
        keep(export(given.work), given.keep)
    if given.json is not None:
        torch.set_num_threads(given.threads)
        record = measure(given.work, given.train)
        write_json(given.json, record)
        for name in ("tokens_seen", "seconds", "loss", "largest_difference_of_logits", "fp8"):
            print(name, record[name])
        print("mass over the best", record["mass"]["mass_over_oracle"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
