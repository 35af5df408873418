#!/usr/bin/env python3
"""Stores the indexers of a training run in fp16 as those that ship with the package.

    python scripts/ship_indexers.py runs/default --dense-layers 0,7,18

Layers named here stay dense from now on, whatever was trained for them. fp16 keeps 11 bits of each weight, well beyond
the 7 or 8 that index queries and keys are quantised to when they are used, and halves the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dsa
from dsa import LayerConfig
from dsa.cli.train_indexers import parse_layers
from dsa.models.checkpoint import SHIPPED
from dsa.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `dsa train default` wrote, or its indexer file")
    parser.add_argument("--dense-layers", type=parse_layers, default=[], help="such as 0,7,18")
    given = parser.parse_args()
    model = load_model("default").model
    layers = {layer: LayerConfig(dense=True) for layer in given.dense_layers}
    print(dsa.attach(model, indexers=given.run, layers=layers))
    file = dsa.save_indexers(model, SHIPPED, dtype=torch.float16)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
