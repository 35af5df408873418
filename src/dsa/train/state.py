"""The folder of a training run, and the one file from which it resumes.

    indexers.safetensors   the result so far, for `dsa.attach`
    state.safetensors      weights, AdamW moments, step, and what the run was told: all that a resume needs
    log.jsonl              one line per step
    holdout.jsonl          one line per measurement on held-out text
    run.yaml               what `dsa train` was told, for `--config`

The state is a single file replaced as a whole, so it is consistent whenever the run dies. The indexers are written
after it; a resume writes them again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from dsa.runs.files import check_folder_writable, write_atomically, write_tensors
from dsa.runs.json_files import Count, parse_json

STATE = "state.safetensors"
INDEXERS = "indexers.safetensors"
LOG = "log.jsonl"
HOLDOUT = "holdout.jsonl"
RECIPE = "run.yaml"
FORMAT = "dsa-training-state"
VERSION = "2"
# The file that is being replaced and its successor exist at the same time.
COPIES = 2
PART_END = ":"
_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands.

    Args:
        step: Steps finished.
        seconds: Time spent in them.
        identity: What must be the same for the losses to continue.
        tensors: Weights and moments by part (`"layers.3"`, say) and name.
    """

    step: int
    seconds: float
    identity: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]


_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Damaged(Exception):
    """A field of a state is not what it must be."""


@dataclass(frozen=True)
class _Logged:
    """What every line of a log has."""

    step: Count


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.state_file = self.path / STATE
        self.indexers_file = self.path / INDEXERS
        self.log_file = self.path / LOG
        self.holdout_file = self.path / HOLDOUT

    def open_new(self) -> None:
        """Makes the folder for a new run.

        Raises:
            OSError: Something is there already, or the folder cannot be made.
        """
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"out: the folder {self.path} cannot be made: {error.strerror or error}") from error

    def check_new(self) -> None:
        """Refuses a folder with something in it, and one that cannot be written. Raises `OSError`."""
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: {self.path} is a file; expected a folder to write to")
        if self.state_file.exists():
            raise FileExistsError(
                f"out: {self.path} holds a training run already; continue it with --resume, or choose another folder"
            )
        if self.path.exists() and set(self.path.iterdir()) - set(_leftovers(self.path)):
            raise FileExistsError(
                f"out: the folder {self.path} is not empty; choose another one, so that nothing is overwritten"
            )
        check_folder_writable(self.path)

    def check_resumable(self) -> None:
        """Refuses a folder without a run. Raises `FileNotFoundError`."""
        if not self.state_file.is_file():
            raise FileNotFoundError(
                f"resume: {self.path} holds no training run ({STATE} is missing); start one without --resume"
            )

    def check_space(self, state_bytes: int, copies: int = COPIES) -> None:
        """Refuses to begin a run, or a checkpoint, where so many states of that size would not fit.

        Raises:
            OSError: Too little disk.
        """
        free, wanted = shutil.disk_usage(self.path).free, copies * state_bytes
        if free >= wanted:
            return
        kept = self.state_file.exists()
        remedy = "free some and continue with --resume" if kept else "free some, or choose a folder on another disk"
        raise OSError(
            f"out: {self.path} has {_size(free)} free, checkpoints need {_size(wanted)}; {remedy}. "
            + ("What was written before is intact" if kept else "Nothing was trained yet")
        )

    def save(self, state: TrainingState) -> None:
        """Replaces the state as a whole.

        Raises:
            OSError: It cannot be written; the previous state is intact.
        """
        tensors = {
            f"{part}{PART_END}{name}": tensor.contiguous()
            for part, named in state.tensors.items()
            for name, tensor in named.items()
        }
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "step": str(state.step),
            "seconds": repr(state.seconds),
            "identity": json.dumps(state.identity),
        }
        write_tensors(self.state_file, tensors, metadata)

    def load(self) -> TrainingState:
        """Reads the state.

        Raises:
            FileNotFoundError: There is no state here.
            ValueError: It is truncated, corrupt, or of another format.
        """
        self.check_resumable()
        try:
            with safe_open(self.state_file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                    raise ValueError(
                        f"resume: {self.state_file} is not a training state of this version of dsa (its format is "
                        f"{metadata.get('format')!r}, version {metadata.get('version')!r})"
                    )
                tensors: dict[str, dict[str, torch.Tensor]] = {}
                for key in opened.keys():  # noqa: SIM118
                    part, _, name = key.partition(PART_END)
                    tensors.setdefault(part, {})[name] = opened.get_tensor(key)
            return TrainingState(
                step=_field(metadata, "step", Count),
                seconds=_field(metadata, "seconds", _Seconds),
                identity=_field(metadata, "identity", dict[str, Any]),
                tensors=tensors,
            )
        except (SafetensorError, _Damaged) as error:
            saved = f"The indexers of the last checkpoint, without the optimizer, are in {self.indexers_file}"
            raise ValueError(
                f"resume: {self.state_file} is truncated or corrupt ({error}); start a new run in another folder. "
                f"{saved if self.indexers_file.exists() else ''}".rstrip()
            ) from error

    def clean(self) -> None:
        """Removes what a killed writer left there."""
        for leftover in _leftovers(self.path):
            leftover.unlink(missing_ok=True)

    def cut_logs(self, step: int) -> None:
        """Drops what was logged after the step that a resumed run starts from."""
        for file in (self.log_file, self.holdout_file):
            if not file.is_file():
                continue
            kept: list[bytes] = []
            for line in file.read_bytes().splitlines(keepends=True):
                # The last line of a killed run may be half a line.
                if not line.endswith(b"\n"):
                    break
                logged = parse_json(line, _Logged, f"resume: line {len(kept) + 1} of {file}", "start a new run")
                if logged.step > step:
                    break
                kept.append(line)
            write_atomically(file, b"".join(kept))

    def log(self, file: Path, record: dict[str, Any]) -> None:
        """Appends a line to `log_file` or `holdout_file`.

        Raises:
            OSError: It cannot be written.
        """
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {file}: {error.strerror or error}; the last checkpoint is intact, continue "
                "with --resume",
            ) from error


SETTINGS = "settings"
FOLLOWING = {"warmup_steps", "decay_steps", "queries_per_update", "updates_per_sequence"}
"""Settings that follow from others where they are not given."""


def _field(metadata: dict[str, str], name: str, expected: Any) -> Any:
    try:
        return parse_json(metadata.get(name, ""), expected, name, "it is what a checkpoint says of itself")
    except ValueError as error:
        raise _Damaged(str(error)) from error


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What two identities disagree about, one phrase each; settings are called as the options of `dsa train` are.

    What follows from another setting is not named next to that one.
    """
    changed_keys = {key for key in {*before, *now} if before.get(key) != now.get(key)}
    for key in sorted(changed_keys - FOLLOWING or changed_keys):
        old, new = before.get(key), now.get(key)
        if key == SETTINGS and not prefix:
            yield from differences(old or {}, new or {}, "--")
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        else:
            name = f"--{key.replace('_', '-')}" if prefix == "--" else prefix + key
            is_long = isinstance(old, (list, dict)) or isinstance(new, (list, dict)) or len(str(old)) > 40
            yield f"{name} is another" if is_long else f"{name} was {old}, is now {new}"


def _size(count: int) -> str:
    """Bytes, as a person says them."""
    unit = next((each for each in ("GB", "MB", "kB") if count >= _UNITS[each]), "bytes")
    return f"{count:,} bytes" if unit == "bytes" else f"{count / _UNITS[unit]:,.1f} {unit}"


def _leftovers(folder: Path) -> Iterator[Path]:
    for name in (STATE, INDEXERS, LOG, HOLDOUT, RECIPE):
        yield from folder.glob(f".{name}.*")


def state_bytes(tensors: dict[str, dict[str, torch.Tensor]]) -> int:
    """Size of the tensors of a state."""
    return sum(tensor.numel() * tensor.itemsize for named in tensors.values() for tensor in named.values())
