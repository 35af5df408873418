"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, matrix instructions.

    python benchmarks/gpu/resources.py [--targets 80 86 90 100 120] [--kernel NAME]

Compiles the kernels of `sparse_attention`, `indexer_loss` and the appends to caches at the sizes of the benchmark, with
the first configuration that fits each target, and reads the machine code. Fails if a kernel does not compile, and says
where no configuration fits. Needs triton only; it must not run under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from dsa.ops import triton_support
from dsa.ops.index_projection import triton as key_kernels
from dsa.ops.indexer_loss import triton as loss_kernels
from dsa.ops.packed_latents import triton as row_kernels
from dsa.ops.ranges import resolve_ranges
from dsa.ops.sparse_attention import triton as attention_kernels
from dsa.ops.sparse_attention import triton_gradients as gradient_kernels
from dsa.ops.sparse_attention import triton_packed as packed_kernels

INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "RED", "REDG", "STL", "LDL")
TENSOR_MEMORY_COLUMNS = 512
"""Of SM100, per multiprocessor."""

KERNELS = (
    "attend", "attend_packed", "_pack_kernel", "_append_kernel", "merge_splits", "attend_union", "mark", "collect",
    "attend_backward", "sum_by_key", "attention_totals", "index_totals", "divergence", "selected_totals",
    "selected_divergence",
)  # fmt: skip

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel and compiles what it would have launched."""

    def __init__(self, kernel: Any, label: str, capability: int) -> None:
        self.kernel, self.label, self.capability = kernel, label, capability
        self.shared_memory = triton_support.SHARED_MEMORY.get(divmod(capability, 10), 99) << 10
        self.rows: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
        signature, constants, attributes = {}, {}, {}

        def specialised(path: tuple[int, ...], name: str, value: Any) -> Any:
            """The type of an argument, or of each element of a tuple; notes what the compiler may count on."""
            if isinstance(value, Tensor):
                attributes[path] = [["tt.divisibility", 16]]
                return POINTERS[value.dtype]
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, tuple) and name.islower():
                return tuple(specialised((*path, place), name, each) for place, each in enumerate(value))
            if type(value) is int and value != 1 and name.islower():
                if value % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
                return "i32"
            constants[path] = value
            return "constexpr"

        for place, (name, value) in enumerate(bound.items()):
            signature[name] = specialised((place,), name, value)
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        limits = {
            "shared memory": (compiled.metadata.shared, self.shared_memory),
            "tensor memory": (getattr(compiled.metadata, "tmem_size", None) or 0, TENSOR_MEMORY_COLUMNS),
        }
        for name, (needed, there) in limits.items():
            if needed > there:
                raise OutOfResources(needed, there, name)
        sizes = {k: v for k, v in kwargs.items() if k.startswith("BLOCK") or k == "STAGES"} | options
        self.rows.append(
            {
                "kernel": self.label,
                "target": self.capability,
                **{name.split()[0]: needed for name, (needed, _) in limits.items()},
                "sizes": sizes,
            }
            | machine_code(compiled.asm["cubin"])
        )


def machine_code(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, and counts of instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [str(tools / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")
    counts = collections.Counter(re.findall(r"\b(" + "|".join(INSTRUCTIONS) + r")\b", code))
    found = {key: int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK")}  # type: ignore[union-attr]
    return found | {name: counts[name] for name in INSTRUCTIONS}


def attention_calls() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Small tensors with the head counts and dims of the benchmark."""
    # Integers that equal one become constants when a kernel is compiled: all of them at once.
    one = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    yield "ones", (one, one, one.clone(), torch.zeros(1, 1, 1, dtype=torch.int32))
    indices = torch.zeros(1, 16, 2048, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rows = torch.zeros(1, 64, 1, 576, dtype=dtype)
        yield f"mla {name}", (torch.zeros(1, 16, 128, 576, dtype=dtype), rows, rows[..., :512], indices)
        k, v = torch.zeros(2, 1, 64, 8, 128, dtype=dtype)
        yield f"gqa {name}", (torch.zeros(1, 16, 32, 128, dtype=dtype), k, v, indices)


def compile_all(capability: int, wanted: str) -> Iterator[dict[str, Any]]:
    """Rows of the table for one target."""
    limit = triton_support.SHARED_MEMORY.get(divmod(capability, 10), 99) << 10
    with mock.patch.object(triton_support, "shared_memory", return_value=limit):
        for label, (q, k, v, indices) in attention_calls():
            for splits, names in ((1, ["attend"]), (2, ["merge_splits"])):
                yield from record(
                    attention_kernels, names, f"{label} forward", capability, wanted,
                    lambda s=splits, a=(q, k, v, indices): attention_kernels.forward(*a, None, 0.1, None, splits=s),
                )  # fmt: skip
            out, lse = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.zeros(q.shape[:3])
            yield from record(
                gradient_kernels, ["attend_backward"], f"{label} backward", capability, wanted,
                lambda a=(out, q, k, v, indices, None, out, lse): gradient_kernels.backward(*a, 0.1, None),
            )  # fmt: skip
            if label == "gqa bfloat16":
                sinks, options = torch.zeros(q.shape[2]), f"{label} with sinks, softcap, fixed order,"
                for splits, names in ((1, ["attend"]), (2, ["attend", "merge_splits"])):
                    yield from record(
                        attention_kernels, names, f"{options} forward", capability, wanted,
                        lambda s=splits, a=(q, k, v, indices, sinks): attention_kernels.forward(*a, 0.1, 3.0, splits=s),
                    )  # fmt: skip
                # SM100 does without: see `_shares_tiles`.
                with mock.patch.object(attention_kernels, "SHARING_ROWS", 1 << 62 if capability == 100 else 1):
                    yield from record(
                        attention_kernels, ["mark", "collect", "attend_union", "attend"], f"{options} shared forward",
                        capability, wanted, lambda a=(q, k, v, indices, sinks): attention_kernels.forward(*a, 0.1, 3.0),
                    )  # fmt: skip
                torch.use_deterministic_algorithms(True)
                yield from record(
                    gradient_kernels, ["attend_backward", "sum_by_key"], f"{options} backward", capability, wanted,
                    lambda a=(out, q, k, v, indices, sinks, out, lse): gradient_kernels.backward(*a, 0.1, 3.0),
                )  # fmt: skip
                torch.use_deterministic_algorithms(False)
        yield from compile_packed(capability, wanted)
        yield from compile_appends(capability, wanted)
        for label, selected in (("loss dense", None), ("loss selected", indices)):
            for dtype in (torch.bfloat16, torch.float32, torch.float16):
                tokens, keys, heads, groups, dim, index_heads, index_dim = 16, 64, 32, 8, 128, 8, 64
                if dtype == torch.float16:
                    label = f"ones, sinks, softcap, {label}"
                    tokens, keys, heads, groups, dim, index_heads, index_dim = 1, 1, 1, 1, 1, 1, 1
                    selected = selected if selected is None else selected[:, :1, :1]
                q, k = torch.zeros(1, tokens, heads, dim, dtype=dtype), torch.zeros(1, keys, groups, dim, dtype=dtype)
                index = torch.zeros(1, tokens, index_heads, index_dim, dtype=dtype), torch.zeros(1, keys, index_dim)
                index = index[0], index[1].to(dtype)
                visible = resolve_ranges("", None, None, 1, tokens, keys, torch.device("cpu"))
                sinks, softcap = (torch.zeros(heads), 3.0) if dtype == torch.float16 else (None, None)
                constants = loss_kernels.Constants(q, k, sinks, selected, 0.1, 0.1, softcap, visible, visible)
                names = ["selected_totals", "selected_divergence"]
                if selected is None:
                    names = ["attention_totals", "index_totals", "divergence"]
                yield from record(
                    loss_kernels, names, f"{label} {str(dtype).removeprefix('torch.')}", capability, wanted,
                    lambda i=index, c=constants: loss_kernels.loss_and_gradients(
                        *i, i[0][..., 0].contiguous(), c, True, None
                    ),
                )  # fmt: skip


def compile_packed(capability: int, wanted: str) -> Iterator[dict[str, Any]]:
    """Attention over FP8 rows: in one piece, in pages, and with everything at once, also where sizes are one."""
    indices = torch.zeros(1, 16, 2048, dtype=torch.int32)
    # Where a GPU has e4m3 numbers is asked of the tensors' device, which is none here.
    with (
        mock.patch.object(packed_kernels, "has_fp8", return_value=capability >= 89),
        mock.patch.object(
            packed_kernels, "_MANY_HEADS", packed_kernels._MANY_HEADS[0 if capability // 10 in (9, 10) else 2 :]
        ),
    ):
        for dtype, heads, page in (
            (torch.bfloat16, 128, 0), (torch.bfloat16, 128, 64), (torch.bfloat16, 16, 64), (torch.float32, 128, 0)
        ):  # fmt: skip
            q, data = torch.zeros(1, 16, heads, 576, dtype=dtype), torch.zeros(1, 128, 656, dtype=torch.uint8)
            table = torch.zeros(1, 2, dtype=torch.int32) if page else None
            label = f"packed {str(dtype).removeprefix('torch.')} {heads} heads{' paged' if page else ''}"
            yield from record(
                packed_kernels, ["attend_packed"], label, capability, wanted,
                lambda a=(q, data[0] if page else data, table), page=page: packed_kernels.forward(
                    *a, indices, None, 128, page, 512, 0.1, None, splits=1
                ),
            )  # fmt: skip
        q, data = torch.zeros(1, 1, 1, 4, dtype=torch.float16), torch.zeros(1, 8, dtype=torch.uint8)
        yield from record(
            packed_kernels, ["attend_packed", "merge_splits"], "ones, sinks, softcap, packed float16", capability,
            wanted, lambda: packed_kernels.forward(
                q, data, torch.zeros(1, 1, dtype=torch.int32), indices[:, :1, :1], torch.zeros(1), 1,
                1, 4, 0.1, 3.0, splits=2,
            ),
        )  # fmt: skip


def compile_appends(capability: int, wanted: str) -> Iterator[dict[str, Any]]:
    """What writes to caches: FP8 rows and keys out of an indexer's projection, also where sizes are one."""
    for label, rows, latent_dim in (
        ("rows", torch.zeros(2, 64, 576, dtype=torch.bfloat16), 512), ("ones, rows", torch.zeros(1, 1, 1), 1)
    ):  # fmt: skip
        yield from record(
            row_kernels, ["_pack_kernel"], f"append {label}", capability, wanted,
            lambda x=rows, latent=latent_dim: row_kernels.pack_latents(x, latent, latent == 512, None),
        )  # fmt: skip
    for label, dim, rotated, dtype in (
        ("int8", 64, 32, torch.int8),
        ("fp8", 128, 0, torch.uint8),
        ("ones, fp32", 1, 0, None),
    ):
        tables = (None, None) if not rotated else torch.zeros(2, 1, 16, rotated).unbind(0)
        key, norm = torch.zeros(1, 1 if dtype is None else 16, dim, dtype=torch.bfloat16), torch.zeros(dim)
        data, scale = torch.zeros(key.shape, dtype=dtype or torch.float32), torch.zeros(key.shape[:2])
        yield from record(
            key_kernels, ["_append_kernel"], f"append {label} keys", capability, wanted,
            lambda a=(key, norm, norm, *tables, data, None if dtype is None else scale): key_kernels._append(*a),
        )  # fmt: skip


def record(module: Any, names: list[str], label: str, capability: int, wanted: str, call: Any) -> list[dict[str, Any]]:
    """Compiles the named kernels of a module as one call launches them."""
    everything = [n for n in KERNELS if hasattr(module, n)]
    recorders = {n: Recorder(getattr(module, n), f"{label} {n}", capability) for n in everything}
    with mock.patch.multiple(module, **{n: mock.MagicMock() for n in everything}):
        chosen = [n for n in names if wanted in recorders[n].label]
        with mock.patch.multiple(module, **{n: recorders[n] for n in chosen}) if chosen else mock.MagicMock():
            if chosen:
                try:
                    call()
                except NotImplementedError as error:
                    print(f"{label:62s} {capability:3d} {error}", flush=True)
    return [row for n in names for row in recorders[n].rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 86, 90, 100, 120])
    parser.add_argument("--kernel", default="", help="only kernels whose label contains this")
    arguments = parser.parse_args()
    columns = ("tensor", "REG", "STACK", *INSTRUCTIONS)
    print(f"{'kernel':62s} sm   shared  " + " ".join(f"{c:>7s}" for c in columns) + "  sizes")
    for target in arguments.targets:
        for row in compile_all(target, arguments.kernel):
            print(
                f"{row['kernel']:62s} {target:3d} {row['shared']:7d} "
                + " ".join(f"{row[c]:7d}" for c in columns)
                + "  " + " ".join(f"{k}={v}" for k, v in row["sizes"].items()),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
