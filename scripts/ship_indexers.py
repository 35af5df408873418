#!/usr/bin/env python3
"""Stores the indexers of a training run in fp16 as those that ship with the package.

    python scripts/ship_indexers.py runs/default

fp16 keeps 11 bits of each weight, well beyond the 7 or 8 that index queries and keys are quantised to when they are
used, and halves the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dsa
from dsa.models.checkpoint import SHIPPED
from dsa.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `dsa train default` wrote, or its indexer file")
    model = load_model("default").model
    print(dsa.attach(model, indexers=parser.parse_args().run))
    file = dsa.save_indexers(model, SHIPPED, dtype=torch.float16)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
