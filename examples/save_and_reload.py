"""Save an attached model, load it again with plain transformers, and get the same logits.

    python examples/save_and_reload.py DIRECTORY [MODEL]

After `import dsa`, `AutoModelForCausalLM.from_pretrained` knows attached models. Where dsa is not imported,
`trust_remote_code=True` lets the saved folder import it.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import dsa
from dsa.models.loading import load_model


def main(directory: str, model: str = "default") -> None:
    loaded = load_model(model, device="cpu")
    dsa.attach(loaded.model, indexers="default" if loaded.is_default else None)
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)

    again = AutoModelForCausalLM.from_pretrained(directory, dtype=loaded.model.dtype).eval()
    ids = torch.tensor([loaded.tokenizer("Sparse attention reads what it needs.")["input_ids"]])
    with torch.no_grad():
        same = torch.equal(loaded.model(ids).logits, again(ids).logits)
    print(f"{type(again).__name__} with top_k {dsa.config_of(again).top_k}: logits bit-identical: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
