"""Score a model with EleutherAI's lm-eval, dense and with DSA attached, on tasks made of local files.

    python examples/lm_eval_attached.py [MODEL] [TOP_K]

The tasks are the YAML files in examples/lm_eval. An attached model goes into lm-eval's own wrapper as it is; so does
any task of lm-eval's, by its name. `pip install 'dsa-attention[lm-eval]'`
"""

import logging
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import dsa
from dsa.models.loading import load_model

TASKS = ("letters_choice", "letters_answer")


def main(model: str = "default", top_k: str = "64") -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = load_model(model)
    tasks = TaskManager(include_path=str(Path(__file__).parent / "lm_eval"), include_defaults=False)

    def score(name: str) -> None:
        wrapped = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
        found = simple_evaluate(model=wrapped, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0)["results"]
        choice, answer = (found[task] for task in TASKS)
        print(f"{name:<6} right choices {choice['acc,none']:.3f}   named in answers {answer['contained,none']:.3f}")

    score("dense")
    indexers = "default" if loaded.is_default else None
    dsa.attach(loaded.model, indexers=indexers, top_k=int(top_k), local=int(top_k) // 4)
    score("DSA")


if __name__ == "__main__":
    main(*sys.argv[1:])
