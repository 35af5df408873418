#!/usr/bin/env python3
"""Packed weights next to what torch has: products of one shape, and the default model's perplexity and tokens.

    python benchmarks/packed_products.py --json benchmarks/results/DATE-packed.json

products  time, error and bytes of each form for 1, 8, 512 and 4,096 rows of activations; the matrices for one row are
          taken in turn, so that they come from memory. The error is that of the result next to fp64, relative
quality   perplexity with each form over that in fp32, with 95 % intervals over blocks of 64 tokens, of the default
          model on `--text-tokens` tokens of each of `--texts`; "own blocks" are those of its file
tokens    seconds to read 512 and 8,192 tokens, and milliseconds of a written token after them, attached
bandwidth what a plain sum reads, GB/s

Forms that this machine or this torch lacks are left out, with the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa.eval.ratio import perplexity_ratio
from dsa.generation.session import Session
from dsa.models.loading import load_model
from dsa.models.packing import pack_weights
from dsa.models.sparse import attach_indexers
from dsa.ops import pack_weight, packed_linear
from dsa.runs.files import write_json
from dsa.runs.inputs import encode, read_document
from dsa.runs.machine import describe_machine

ROWS = (1, 8, 512, 4096)
COPIES_BYTES = 192 << 20

Product = Callable[[Tensor], Tensor]
Made = Callable[[Tensor], tuple[Product, int]]
"""Given a weight `[N, C]`, its product and the bytes that are kept of it."""


def plain(dtype: torch.dtype) -> Made:
    def made(weight: Tensor) -> tuple[Product, int]:
        kept = weight.to(dtype)
        return lambda x: torch.nn.functional.linear(x.to(dtype), kept).float(), kept.nbytes

    return made


def ours(format: Any) -> Made:
    def made(weight: Tensor) -> tuple[Product, int]:
        packed = pack_weight(weight, format)
        return lambda x: packed_linear(x, packed), packed.bytes

    return made


def torch_int8(weight: Tensor) -> tuple[Product, int]:
    """`_weight_int8pack_mm`: a scale a row, activations in bf16."""
    scale = weight.abs().amax(1) / 127
    quants, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    product = torch.ops.aten._weight_int8pack_mm
    return lambda x: product(x.bfloat16(), quants, scale).float(), quants.nbytes + scale.nbytes


def torch_int4(weight: Tensor) -> tuple[Product, int]:
    """`_weight_int4pack_mm_for_cpu`: groups of 32, activations in bf16."""
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp_min(1e-9)
    quants = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants, 1)
    scales = torch.stack((scale, low + 8 * scale), 2).transpose(0, 1).contiguous().bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: product(x.bfloat16(), packed, 32, scales).float(), packed.nbytes + scales.nbytes


def dynamic(engine: str) -> Made:
    """torch's dynamic quantisation: one scale for all activations of a call."""

    def made(weight: Tensor) -> tuple[Product, int]:
        if engine not in torch.backends.quantized.supported_engines:
            raise RuntimeError(f"this torch has no engine {engine}")
        torch.backends.quantized.engine = engine
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        whole = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)
        return whole, weight.numel()

    return made


PRODUCTS: dict[str, Made] = {
    "fp32, F.linear": plain(torch.float32),
    "bf16, F.linear": plain(torch.bfloat16),
    "int8, _weight_int8pack_mm": torch_int8,
    "int8, dynamic fbgemm": dynamic("fbgemm"),
    "int8, dynamic onednn": dynamic("onednn"),
    "int8, dsa Q8_0": ours("Q8_0"),
    "int4, _weight_int4pack_mm_for_cpu": torch_int4,
    "int4, dsa Q4_1": ours("Q4_1"),
}


def best_s(call: Callable[[], object], least_s: float = 0.3) -> float:
    """The shortest of several runs."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least_s:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@torch.no_grad()
def products(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each form, shape and number of rows of activations."""
    found: list[dict[str, Any]] = []
    for size in given.shapes:
        out, into = (int(each) for each in size.split("x"))
        weight = torch.randn(out, into, generator=torch.Generator().manual_seed(0)) * into**-0.5
        for name, make in PRODUCTS.items():
            row: dict[str, Any] = {"form": name, "shape": [out, into]}
            try:
                product, nbytes = make(weight)
                copies = [product] + [make(weight)[0] for _ in range(min(200, COPIES_BYTES // nbytes))]
                for rows in ROWS:
                    x = torch.randn(rows, into, generator=torch.Generator().manual_seed(rows))
                    exact = x.double() @ weight.double().T
                    row["error"] = float((product(x) - exact).norm() / exact.norm())
                    turns = iter(range(1 << 30))
                    taken = best_s(lambda: copies[next(turns) % len(copies)](x))  # noqa: B023
                    row[f"{rows}"] = {"ms": 1e3 * taken, "gflops": 2e-9 * rows * out * into / taken}
                row |= {"bytes": nbytes, "gb_per_s": 1e-6 * nbytes / row["1"]["ms"]}
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                row["missing"] = str(error).splitlines()[0]
            found.append(row)
            print(row, flush=True)
    return found


@torch.no_grad()
def quality(given: argparse.Namespace) -> dict[str, Any]:
    """Perplexity over that in fp32, of all texts together and each."""
    loaded = load_model("default")
    texts = [encode(read_document(file), loaded.tokenizer, given.text_tokens) for file in given.texts]

    def losses(model: Any) -> list[Tensor]:
        kept = [(ids, model(ids, use_cache=False).logits[0, :-1]) for ids in texts]
        return [torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") for ids, logits in kept]

    before = losses(loaded.model)
    found: dict[str, Any] = {
        "texts": [file.name if file is not None else "Python reference" for file in given.texts],
        "tokens": given.text_tokens,
        "fp32": [float(each.mean().exp()) for each in before],
    }
    for form in ("int8", "int4", "own blocks"):
        model = load_model("default", weights="auto" if form == "own blocks" else None).model
        if form != "own blocks":
            pack_weights(model, form)
        ours = losses(model)
        each = [vars(perplexity_ratio([one], [other])) for one, other in zip(ours, before, strict=True)]
        found[form] = {"together": vars(perplexity_ratio(ours, before)), "each": each}
        print(form, perplexity_ratio(ours, before), flush=True)
    return found


def tokens(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Reading and writing, attached."""
    found = []
    for form in ("fp32", "int8", "auto"):
        loaded = load_model("default", weights=None if form == "fp32" else form)
        attach_indexers(loaded, None)
        ids = encode(read_document(), loaded.tokenizer, max(given.lengths))[0].tolist()
        for length in given.lengths:
            Session(loaded.model).read(ids[:64])
            session = Session(loaded.model)
            session.read(ids[:length], new_tokens=32)
            for _ in session.write(32):
                pass
            taken = session.timings
            each = {"form": form, "tokens": length, "read_s": taken.read_s}
            each["token_ms"] = None if taken.token_s is None else 1e3 * taken.token_s
            found.append(each)
            print(each, flush=True)
    return found


def bandwidth() -> float:
    """What a plain sum reads, GB/s."""
    numbers = torch.ones(64 << 20)
    return 1e-9 * numbers.nbytes / best_s(numbers.sum)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--only", nargs="+", choices=("products", "quality", "tokens"), default=["products"])
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "4096x4096"], metavar="OUTxIN")
    parser.add_argument("--texts", nargs="+", type=Path, default=[None], help="for quality")
    parser.add_argument("--text-tokens", type=int, default=4096, help="of each of them")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 8192], help="for tokens")
    given = parser.parse_args()
    record: dict[str, Any] = {"machine": describe_machine(), "bandwidth_gb_per_s": bandwidth()}
    for part in given.only:
        record[part] = {"products": products, "quality": quality, "tokens": tokens}[part](given)
        if given.json is not None:
            write_json(given.json, record)


if __name__ == "__main__":
    main()
