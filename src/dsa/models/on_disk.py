"""Which models are on this disk, and which of them dsa runs sparse; only their configurations are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsa.cost.report import config_for
from dsa.cost.source import DEFAULT, INDEXERS, read_model
from dsa.cost.work import Storage, memory
from dsa.models.checkpoint import SHIPPED, read_indexers
from dsa.models.families import ATTACHABLE, BORN_WITH_DSA, REFUSED

SUGGESTED = {
    "Qwen/Qwen3-0.6B": "Qwen3-0.6B",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "SmolLM2-1.7B",
    "Qwen/Qwen3-8B": "Qwen3-8B",
}
"""Models of the Hub that answer over longer texts than the default one, and their presets of `dsa cost`."""
FP32 = Storage(weights=4.0, cache=4.0)
SAVED_ATTACHED = "dsa_"


@dataclass(frozen=True)
class FoundModel:
    """A model on this disk.

    Args:
        name: What to call it where a command asks for a MODEL.
        path: Its folder or file.
        bytes: What its files take.
        model_type: As its configuration says.
        state: What dsa makes of it: `trained` (it comes with indexers), `born with DSA`, `attachable` (it needs
            `--indexers`), or `no`.
        reason: Why not, for `no`.
        memory: Bytes of weights and caches in fp32 with so many tokens, as on a CPU; `None` where that is not known.
    """

    name: str
    path: str
    bytes: int
    model_type: str
    state: str
    reason: str = ""
    memory: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def models_on_disk(folders: Sequence[Path], tokens: int) -> list[FoundModel]:
    """The default model, those in the Hub's cache, and those in folders and one level below them.

    Args:
        folders: Where else to look.
        tokens: For how many tokens memory is counted.

    Raises:
        OSError: A folder is not there or cannot be read.
    """
    for folder in folders:
        if not folder.expanduser().is_dir():
            raise FileNotFoundError(f"folder: there is no folder {folder}")
    inside = [
        (str(each), each)
        for folder in map(Path.expanduser, folders)
        for each in (folder, *sorted(folder.iterdir()))
        if (each / "config.json").is_file()
    ]
    found = [_described(name, path, _size(path), tokens) for name, path in inside]
    cached = [_described(name, path, size, tokens) for name, path, size in _in_hub_cache()]
    return [*_default(tokens), *cached, *found]


def suggestions(tokens: int) -> dict[str, float | None]:
    """Models to fetch, and their memory as in `FoundModel`."""
    return {name: _memory(preset, tokens) for name, preset in SUGGESTED.items()}


def _default(tokens: int) -> Iterator[FoundModel]:
    from dsa.models.default_model import default_gguf

    try:
        gguf = default_gguf()
    except ImportError:
        return
    state = "trained" if SHIPPED.exists() else "attachable"
    yield FoundModel(DEFAULT, str(gguf), gguf.stat().st_size, "llama", state, memory=_memory(DEFAULT, tokens))


def _in_hub_cache() -> Iterator[tuple[str, Path, int]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, ValueError):
        return
    for each in sorted(repositories, key=lambda each: each.repo_id):
        snapshots = sorted(each.revisions, key=lambda revision: -revision.last_modified)
        if each.repo_type == "model" and snapshots and (snapshots[0].snapshot_path / "config.json").is_file():
            yield each.repo_id, snapshots[0].snapshot_path, each.size_on_disk


def _described(name: str, path: Path, size: int, tokens: int) -> FoundModel:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return FoundModel(name, str(path), size, "?", "no", "its config.json cannot be read")
    state, reason = _state(path, model_type)
    if state != "no" and not any(path.glob("*.safetensors")):
        state, reason = "no", "it has no safetensors weights"
    return FoundModel(name, str(path), size, model_type, state, reason, _memory(str(path), tokens))


def _state(path: Path, model_type: str) -> tuple[str, str]:
    family = model_type.removeprefix(SAVED_ATTACHED)
    if family in BORN_WITH_DSA:
        return "born with DSA", ""
    if family in ATTACHABLE:
        is_saved = family != model_type or (path / INDEXERS).is_file()
        return ("trained" if is_saved else "attachable"), ""
    return "no", REFUSED.get(family, f"dsa does not know the architecture {family!r}")


def _memory(name: str, tokens: int) -> float | None:
    try:
        shape, own = read_model(name, lambda source: read_indexers(source).config)
        return sum(memory(shape, config_for(shape, own), tokens, FP32).to_json().values())
    except (OSError, ValueError):
        return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
