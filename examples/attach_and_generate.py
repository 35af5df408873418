"""Attach DSA to a model, read a prompt sparsely and continue it.

    python examples/attach_and_generate.py [MODEL] [FILE]

MODEL is a Hugging Face id, a directory, or `default`: the embedded SmolLM2-135M with its shipped indexers. FILE is
a text to continue; without it, the beginning of the Python language reference is.
"""

import sys

import torch

import dsa
from dsa.models.loading import load_model
from dsa.runs.inputs import encode, read_document


def main(model: str = "default", file: str | None = None) -> None:
    loaded = load_model(model)
    ids = encode(read_document(file), loaded.tokenizer, default=1500).to(loaded.model.device)

    # For any other model: indexers="runs/mine", what `dsa train MODEL --out runs/mine` wrote. Without indexers
    # they are random, and the report says so.
    report = dsa.attach(loaded.model, indexers="default" if loaded.is_default else None, top_k=512)
    print(report)

    made = loaded.model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=loaded.tokenizer.pad_token_id)
    print(loaded.tokenizer.decode(made[0, ids.shape[1] :]))

    dsa.detach(loaded.model)  # the plain model again
    with torch.no_grad():
        print(f"plain model, next token: {int(loaded.model(ids, logits_to_keep=1).logits.argmax())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
