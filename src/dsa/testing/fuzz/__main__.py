"""`python -m dsa.testing.fuzz`: runs the fuzzer for some minutes, or repeats one case."""

from __future__ import annotations

import argparse
import sys
import time

from dsa.testing.fuzz.run import OPERATIONS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsa.testing.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to draw new cases (default: 10)")
    parser.add_argument("--seed", type=int, help="number of the first case (default: from the clock)")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--operation", choices=sorted(OPERATIONS), help="only this one")
    parser.add_argument("--impl", nargs="+", choices=("native", "reference", "triton"), default=["native", "reference"])
    parser.add_argument("--keep-going", action="store_true", help="go on after a difference")
    arguments = parser.parse_args()
    seed = int(time.time()) * 1_000_000 if arguments.seed is None else arguments.seed
    operations = [arguments.operation] if arguments.operation else sorted(OPERATIONS)
    if "triton" in arguments.impl:
        operations = [name for name in operations if name != "dense_attention"]
        from dsa.testing.triton_interpreter import start_interpreter

        start_interpreter()
    result = fuzz(
        seed=seed,
        seconds=60 * arguments.minutes,
        cases=arguments.cases,
        operations=operations,
        implementations=tuple(arguments.impl),
        keep_going=arguments.keep_going,
    )
    for failure in result.failures:
        print(failure, flush=True)
    counts = ", ".join(f"{count} of {name}" for name, count in sorted(result.counts.items()))
    print(f"{sum(result.counts.values())} cases from seed {seed} in {result.seconds:.0f} s ({counts}): ", end="")
    print(f"{len(result.failures)} differences")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
