"""One attention layer of DeepSeek-V3.2's real shape: a long prefill, and a decoding step over a long cache.

    python benchmarks/latent_layer.py prefill --tokens 32768 --limit-gb 12 --json result.json
    python benchmarks/latent_layer.py decode --tokens 131072 --peer-tokens 65536 --layer-tokens 32768 --json result.json
    python benchmarks/latent_layer.py touched --tokens 131072 --json result.json

Weights are random. A prefill runs under a limit on the process's own memory, in chunks and with a cache of latents and
index keys. Under the same limit transformers' layer then reads 1,024 tokens, 2,048 and so on, each length in a process
of its own, until it is refused memory; the statement that asked for it is reported (`transformers` is that process).

Decoding is compared with attention alone over expanded keys and values, eager and torch's fused one, at a length that
fits in memory: projections, the indexer and the new token's expansion are left out of it. A step grows with its length,
so one at `--tokens` would take longer in proportion. transformers' whole layer, which caches latents and expands all of
them for every token, has its own length.

`touched` counts what a decoding step reads of its cache: pages of 4 KB whose accessed bit the processor set during the
step (Linux). A page counts as a whole, and a selected row of 2,304 bytes lies on one or two of them.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import mmap
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

from dsa.config import DSAConfig
from dsa.models.families import BORN_WITH_DSA
from dsa.models.latent.attention import LatentAttention
from dsa.models.layer import LayerPlan
from dsa.modules.latents import latent_layer
from dsa.runs.machine import describe_machine, peak_rss_mb, reset_peak_rss

REPEATS = 5
PEER_REPEATS = 2
CHUNK = 4096
SHORTEST = 1024
FILLED_AT_ONCE = 1024
"""Tokens of random keys and values that expanded ones repeat: making billions of random numbers takes minutes."""


@dataclass(frozen=True)
class Parts:
    """The layer, transformers' one with the same weights, and what turns positions into angles."""

    ours: LatentAttention
    original: DeepseekV32Attention
    rotary: DeepseekV32RotaryEmbedding
    config: DeepseekV32Config

    def angles(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        return self.rotary(torch.empty(0), torch.arange(first, first + tokens)[None])

    def hidden(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, self.config.hidden_size)


def make_parts(attention: str = "eager") -> Parts:
    config = DeepseekV32Config(num_hidden_layers=1)
    config._attn_implementation = attention
    torch.manual_seed(0)
    original = DeepseekV32Attention(config, 0).eval()
    ours = LatentAttention(original, _plan(config.index_topk), BORN_WITH_DSA["deepseek_v32"])
    return Parts(ours, original, DeepseekV32RotaryEmbedding(config), config)


def _plan(top_k: int) -> LayerPlan:
    return LayerPlan(0, DSAConfig(top_k=top_k, sinks=0, local=0, index_dtype="fp32"))


def check(parts: Parts) -> float:
    """Largest difference from transformers' eager layer on few tokens and a small budget."""
    small = copy.copy(parts.config)
    small.index_topk = 64
    small._attn_implementation = "eager"
    original = DeepseekV32Attention(small, 0).eval()
    original.load_state_dict(parts.original.state_dict())
    ours = LatentAttention(original, _plan(64), BORN_WITH_DSA["deepseek_v32"])
    hidden, angles = parts.hidden(256), parts.angles(0, 256)
    return float((ours(hidden, angles)[0] - original(hidden, angles, _causal_mask(256))[0]).abs().max())


def _causal_mask(tokens: int) -> Tensor:
    """As transformers' eager path has it: `[1, 1, T, T]`, added to the scores."""
    return torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]


def prefill(parts: Parts, tokens: int) -> dict[str, Any]:
    """Reads so many tokens in chunks into one cache."""
    cache = DynamicCache(config=parts.config)
    stored = latent_layer(cache, 0, parts.config.kv_lora_rank, "fp32")
    stored.reserve(tokens)
    reset = reset_peak_rss()
    seconds, processor_seconds = [], []
    for first in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - first)
        hidden, angles = parts.hidden(count), parts.angles(first, count)
        began, began_cpu = time.perf_counter(), time.process_time()
        out = parts.ours(hidden, angles, past_key_values=cache)[0]
        seconds.append(time.perf_counter() - began)
        processor_seconds.append(time.process_time() - began_cpu)
        done = f"{first + count:,} tokens: {sum(seconds):.1f} s, {sum(processor_seconds):.1f} s of a processor"
        print(done, file=sys.stderr, flush=True)
    assert out.isfinite().all()
    width = parts.config.kv_lora_rank + parts.config.qk_rope_head_dim
    return {
        "tokens": tokens,
        "chunk": CHUNK,
        "prefill_s": sum(seconds),
        "chunk_s": seconds,
        "prefill_processor_s": sum(processor_seconds),
        "chunk_processor_s": processor_seconds,
        "peak_rss_gb": peak_rss_mb() / 1e3,
        "peak_is_of": "the prefill, weights included" if reset else "the whole process",
        "weights_gb": 4e-9 * sum(parameter.numel() for parameter in parts.ours.parameters()),
        "cache_gb": 4e-9 * tokens * (width + parts.config.index_head_dim),
        "transformers_would_ask_for_gb": {
            "index scores of one operation": 4e-9 * tokens**2 * parts.config.index_n_heads,
            "attention weights of one operation": 4e-9 * tokens**2 * parts.config.num_attention_heads,
        },
    }


def transformers_prefill(attention: str, tokens: int) -> dict[str, Any]:
    """transformers' layer on a prompt of that length, or where it was refused memory."""
    parts = make_parts(attention)
    reset_peak_rss()
    result: dict[str, Any] = {"attention": attention, "tokens": tokens}
    began = time.perf_counter()
    try:
        hidden, angles = parts.hidden(tokens), parts.angles(0, tokens)
        parts.original(hidden, angles, _causal_mask(tokens), past_key_values=DynamicCache(config=parts.config))
    except (RuntimeError, MemoryError) as error:
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        if asked is None and not isinstance(error, MemoryError):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        result |= {
            "completes": False,
            "stopped_in": f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}",
            "asked_for_gb": None if asked is None else int(asked[1]) / 1e9,
        }
    else:
        result |= {"completes": True, "seconds": time.perf_counter() - began}
    return result | {"peak_rss_gb": peak_rss_mb() / 1e3}


def doubled_until_refused(attention: str, limit_gb: float) -> list[dict[str, Any]]:
    """`transformers_prefill` at 1,024 tokens, 2,048 and so on, each in its own process, up to the first refusal."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["completes"]:
        tokens = SHORTEST if not found else 2 * found[-1]["tokens"]
        options = ["--attention", attention, "--tokens", str(tokens), "--limit-gb", str(limit_gb)]
        command = [sys.executable, __file__, "transformers", *options]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append(json.loads(output))
        print(f"transformers, {attention}, {tokens:,} tokens: {output}", file=sys.stderr, flush=True)
    return found


def decode(parts: Parts, tokens: int, peer: int, layer_tokens: int) -> dict[str, Any]:
    config = parts.config
    cache = DynamicCache(config=config)
    stored = latent_layer(cache, 0, config.kv_lora_rank, "fp32")
    stored.reserve(tokens + REPEATS + 2)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    stored.append_index(torch.randn(1, tokens, config.index_head_dim))
    stored.append_rows(torch.randn(1, tokens, width))

    def step() -> None:
        parts.ours(parts.hidden(1), parts.angles(stored.get_seq_length(), 1), past_key_values=cache)

    result: dict[str, Any] = {
        "tokens": tokens,
        "step_ms": _median_ms(step, REPEATS),
        "index_keys_mb": 4e-6 * tokens * config.index_head_dim,
        "selected_rows_mb": 4e-6 * config.index_topk * width,
        "weights_mb": 4e-6 * sum(parameter.numel() for parameter in parts.ours.parameters()),
    }
    result["whole_layer"] = _whole_layer(parts, layer_tokens)
    heads, key_dim, value_dim = config.num_attention_heads, config.qk_head_dim, config.v_head_dim
    query = torch.randn(1, heads, 1, key_dim)
    key, value = (_long(heads, peer, dim) for dim in (key_dim, value_dim))
    peers: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "eager": lambda: (query @ key.transpose(2, 3) * key_dim**-0.5).softmax(dim=-1) @ value,
    }
    outs: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in peers}
    # Seconds each: a first call costs no more than the others.
    for _ in range(PEER_REPEATS):
        for name, attend in peers.items():
            began = time.perf_counter()
            outs[name] = attend()
            times[name].append(1e3 * (time.perf_counter() - began))
    result["expanded"] = {
        "tokens": peer,
        "bytes_gb": 4e-9 * heads * peer * (key_dim + value_dim),
        "largest_difference": float((outs["sdpa"] - outs["eager"]).abs().max()),
        "calls_ms": times,
        "attention_ms": {name: min(each) for name, each in times.items()},
    }
    ours = result["step_ms"]
    for name, of in (("expanded", result["expanded"]["attention_ms"]), ("whole_layer", result["whole_layer"]["ms"])):
        result[name]["times_ours"] = {each: ms / ours for each, ms in of.items()}
        factor = tokens / result[name]["tokens"]
        result[name]["times_ours_in_proportion"] = {each: ms * factor / ours for each, ms in of.items()}
    return result


def touched(parts: Parts, tokens: int) -> dict[str, Any]:
    """Bytes of the cache that lie on pages which one decoding step touched.

    Raises:
        OSError: The system does not tell.
    """
    config = parts.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache = DynamicCache(config=config)
    stored = latent_layer(cache, 0, config.kv_lora_rank, "fp32")
    room = tokens + REPEATS + 2
    stored.reserve(room)
    for count in (1, tokens - 1):
        stored.append_index(torch.randn(1, count, config.index_head_dim))
        rows = stored.append_rows(torch.randn(1, count, width))
        if count == 1:
            # Small pages, which also keep the buffers apart from other memory in the system's account.
            keys = stored.index_keys()
            assert isinstance(keys, Tensor)
            assert isinstance(rows, Tensor)
            for view, dims in ((keys, config.index_head_dim), (rows, width)):
                _small_pages(view.data_ptr(), 4 * room * dims // mmap.PAGESIZE * mmap.PAGESIZE)
    for _ in range(2):
        # The second step counts: the first one makes buffers.
        Path("/proc/self/clear_refs").write_text("1")
        parts.ours(parts.hidden(1), parts.angles(stored.get_seq_length(), 1), past_key_values=cache)
        resident, referenced = _account_of_small_pages()
    wanted = 4 * (tokens * config.index_head_dim + config.index_topk * width)
    return {
        "tokens": tokens,
        "cache_resident_mb": resident / 1e6,
        "cache_touched_mb": referenced / 1e6,
        "index_keys_and_selected_rows_mb": wanted / 1e6,
        "touched_over_wanted": referenced / wanted,
    }


def _small_pages(address: int, size: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_NOHUGEPAGE):
        raise OSError(ctypes.get_errno(), "madvise refused small pages")


def _account_of_small_pages() -> tuple[int, int]:
    """Resident and referenced bytes of all memory that small pages were asked for."""
    found = [0, 0]
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", area, re.MULTILINE))
        if re.search(r"^VmFlags:.*\bnh\b", area, re.MULTILINE):
            found[0] += 1024 * int(sizes["Rss"])
            found[1] += 1024 * int(sizes["Referenced"])
    return found[0], found[1]


def _whole_layer(parts: Parts, tokens: int) -> dict[str, Any]:
    """One step of transformers' layer with a cache of its own, which holds latents too."""
    config = parts.config
    cache = DynamicCache(config=config)
    cache.update(torch.randn(1, 1, tokens, config.kv_lora_rank), torch.randn(1, 1, tokens, config.qk_rope_head_dim), 0)
    cache.update_indexer(torch.randn(1, tokens, config.index_head_dim), 0)
    times = {}
    for name in ("sdpa", "eager"):
        config._attn_implementation = name
        held = cache.get_seq_length()
        arguments = parts.hidden(1), parts.angles(held, 1), torch.zeros(1, 1, 1, held + 1)
        began = time.perf_counter()
        parts.original(*arguments, past_key_values=cache)
        times[name] = 1e3 * (time.perf_counter() - began)
    return {"tokens": tokens, "ms": times}


def _long(heads: int, tokens: int, dim: int) -> Tensor:
    """Expanded keys or values `[1, H, S, dim]`, each token in memory of its own."""
    return torch.randn(1, heads, FILLED_AT_ONCE, dim).repeat(1, 1, tokens // FILLED_AT_ONCE, 1)


def _median_ms(step: Callable[[], object], repeats: int) -> float:
    """Median of so many calls after the first."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times[1:])[repeats // 2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "transformers", "decode", "touched"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--limit-gb", type=float, help="most memory of its own that a process may take, 10^9 bytes")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="of `transformers`")
    parser.add_argument("--peer-tokens", type=int, default=16384, help="length of the expanded keys and values")
    parser.add_argument("--layer-tokens", type=int, default=8192, help="cached tokens of transformers' whole layer")
    parser.add_argument("--other-work", help="what else ran on the machine, for the record")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.limit_gb is not None:
        limit = int(1e9 * given.limit_gb)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if given.what == "transformers":
        print(json.dumps(transformers_prefill(given.attention, given.tokens)))
        return
    parts = make_parts()
    result: dict[str, Any] = {"largest_difference_from_eager": check(parts), "limit_gb": given.limit_gb}
    if given.what == "prefill":
        result |= prefill(parts, given.tokens)
        if given.limit_gb is not None:
            del parts
            result["transformers"] = [
                row for attention in ("eager", "sdpa") for row in doubled_until_refused(attention, given.limit_gb)
            ]
    elif given.what == "touched":
        result |= touched(parts, given.tokens)
    else:
        result |= decode(parts, given.tokens, given.peer_tokens, given.layer_tokens)
    result["peak_rss_gb_of_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result["other_work"] = given.other_work
    result["environment"] = describe_machine(torch.device("cpu"))
    text = json.dumps(result, indent=1, default=str)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
