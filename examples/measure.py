"""Measure on a text what sparse attention keeps of a dense model, and look at it layer by layer.

    python examples/measure.py [MODEL] [FILE] [TOKENS]

`dsa eval` prints the same as a table.
"""

import sys

from dsa.eval.evaluation import evaluate
from dsa.models.loading import load_model
from dsa.runs.inputs import read_document


def main(model: str = "default", file: str | None = None, tokens: str = "2048") -> None:
    result = evaluate(load_model(model), read_document(file), tokens=int(tokens), top_k=int(tokens) // 4, local=32)
    for name, reading in (("dense", result.dense), ("DSA", result.dsa), ("window", result.window)):
        print(f"{name:<7} perplexity {reading.perplexity:8.3f}   prefill {reading.prefill_s:6.2f} s")
    for row in result.layers:
        print(f"layer {row.layer:>2}: mass kept {row.dsa:.3f}, window {row.window:.3f}, oracle {row.oracle:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
