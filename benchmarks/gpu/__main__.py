"""The check and the benchmark of every GPU kernel, in one command.

    python -m benchmarks.gpu [--only SECTION ...] [--small] [--checks] [--seed N] [--selections FILE] [--out FILE.json]

Each section checks its kernels against fp64 on fresh random inputs and stops the run where one is wrong; then it
measures: device events, medians after warm-up, the L2 full of other data. The device's ceilings come first and every
row has its floor next to it; vendors' kernels run next to ours where they are installed. One table comes last, with
what was asked, and all of it is written as JSON.
`--selections` takes a recording of a trained model's selections (`benchmarks/gpu/record_selections.py`).

`--small` runs all of it at sizes for a first try, without a GPU too (then under Triton's interpreter, and its times
mean nothing); `--checks` stops after the checks, which is what a memory checker should see:

    compute-sanitizer --tool memcheck python -m benchmarks.gpu --small --checks
"""

from __future__ import annotations

import argparse
import importlib
import json
import secrets
import sys
import time
from pathlib import Path

import torch

from dsa.testing.triton_interpreter import start_interpreter

SECTIONS = ("sparse_attention", "packed_attention", "whole_path", "indexer_loss", "index_topk", "append")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--small", action="store_true", help="sizes for a first try")
    parser.add_argument("--checks", action="store_true", help="stop each section after its checks")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: another one every time")
    parser.add_argument("--selections", type=Path, help="recorded selections for whole_path, safetensors")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gpu-DEVICE-DATE.json")
    arguments = parser.parse_args()

    if not torch.cuda.is_available():
        if not arguments.small:
            print("no GPU: nothing to measure here; --small runs everything under Triton's interpreter")
            return 2
        assert start_interpreter()
    from benchmarks.gpu import common

    common.SEED = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    found = common.environment() | {"seed": common.SEED, "rows": [], "seconds": {}}
    out = arguments.out
    if out is None and common.DEVICE.type == "cuda" and not arguments.small and not arguments.checks:
        device = "".join(letter if letter.isalnum() else "-" for letter in found["device"].lower())
        out = Path(__file__).parents[1] / "results" / f"gpu-{device}-{found['date']}.json"
    if common.DEVICE.type == "cuda" and not arguments.checks:
        found["rows"].extend(common.ceilings())
    for name in arguments.only:
        section = importlib.import_module(f"benchmarks.gpu.{name}")
        begin = time.perf_counter()
        extra = {"recorded": arguments.selections} if name == "whole_path" else {}
        for row in section.rows(arguments.small, **extra):
            if arguments.checks and not row["what"].startswith("check"):
                break
            found["rows"].append({"section": name} | row)
            print(common.line(row), file=sys.stderr, flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(found, indent=1))
        found["seconds"][name] = time.perf_counter() - begin
    print(" ".join(f"{key} {value}" for key, value in found.items() if key not in ("rows", "seconds")))
    print("\n".join(common.line(row) for row in found["rows"] if row["what"] != "tile"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
