"""Break one layer's indexer on purpose, and let `dsa eval` find it.

    python examples/shuffle_a_layer.py DIRECTORY [LAYER] [MODEL]
    dsa eval MODEL --indexers DIRECTORY --file TEXT --tasks mass

The indexers of MODEL (`default`, or a directory that an attached model was saved in) are written to DIRECTORY, with
the weights of one layer in random order.
"""

import sys

import torch

import dsa
from dsa.models import indexers_of
from dsa.models.loading import load_model
from dsa.models.sparse import attach_indexers


def main(directory: str, layer: str = "12", model: str = "default") -> None:
    loaded = load_model(model)
    attach_indexers(loaded)
    indexers = indexers_of(loaded.model)
    if int(layer) not in indexers:
        raise SystemExit(f"layer {layer} has no indexer; these have: {', '.join(map(str, indexers))}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in indexers[int(layer)].parameters():
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    dsa.save_indexers(loaded.model, directory)
    print(f"layer {layer} is shuffled; dsa eval {model} --indexers {directory} --file TEXT --tasks mass")


if __name__ == "__main__":
    main(*sys.argv[1:])
