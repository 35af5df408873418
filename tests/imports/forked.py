"""Runs pieces of Python in processes in which neither dsa nor any model code of transformers was imported before.

Run as a script: it reads cases, a JSON list of statements each line, and answers each with a line of JSON. What takes
long and has no part in any order (torch, and transformers' list of its own files) is imported once; then every
case is a fork. Such a fork is as good as a fresh process here: it is checked that what matters was not imported.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback
from typing import Any

# `transformers.models` reads the names in all its files when it is imported; that is nine tenths of its time.
PREPARED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "huggingface_hub.serialization",
    "tokenizers",
    "safetensors.torch",
    "transformers",
    "transformers.models",
)
PREPARED_WHERE_INSTALLED = ("accelerate", "PIL.Image", "psutil", "scipy.optimize")


def models_imported() -> list[str]:
    """The modules of transformers in the order of their import, and those of dsa after them."""
    ordered = [name for name in sys.modules if name.split(".")[0] == "transformers"]
    return ordered + [name for name in sys.modules if name.split(".")[0] == "dsa"]


def run(statements: list[str]) -> Any:
    """`result` as the statements leave it, else the modules imported; a string that begins with `failed` on error."""
    scope: dict[str, Any] = {"models_imported": models_imported}
    try:
        for statement in statements:
            exec(statement, scope)
    except BaseException:
        return f"failed: {traceback.format_exc()}"
    return scope.get("result", models_imported())


def forked(statements: list[str]) -> Any:
    """`run` in a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w") as out:
            json.dump(run(statements), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as into:
        told = into.read()
    _, status = os.waitpid(child, 0)
    return json.loads(told) if told else f"failed: the process ended with status {status}"


def main() -> None:
    for name in PREPARED:
        importlib.import_module(name)
    for name in PREPARED_WHERE_INSTALLED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    early = [name for name in models_imported() if name.startswith(("transformers.models.", "dsa"))]
    early += [name for name in ("transformers.modeling_utils", "transformers.generation.utils") if name in sys.modules]
    assert not early, early
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
