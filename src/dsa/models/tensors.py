"""Whether a model's safetensors are the model: every tensor by its name, shape and kind of numbers.

transformers makes up what it does not find and leaves out what it does not know, and reports both as a warning. A model
with one random matrix answers, only worse; so each of them is a refusal here that names the tensor and its file.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHTS = "model*.safetensors"
"""What transformers writes and reads a model's weights as, in one file or several."""

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
FLOATS = ("F64", "F32", "F16", "BF16")
_REMEDY = "copy or download the model again, or correct its config.json"


def folder_of(source: str | Path) -> Path | None:
    """Where a model's files are: its directory, or the snapshot in the Hub's cache once it was downloaded."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(source), "config.json")
    return Path(found).parent if isinstance(found, str) else None


def damaged_file(folder: Path | None) -> str:
    """The first safetensors file that cannot be opened, as a phrase; an empty one where all can."""
    for file in _files(folder):
        try:
            _header(file)
        except (SafetensorError, OSError):
            return f": {file.name}"
    return ""


def check_sizes(name: str, folder: Path | None, config: PreTrainedConfig) -> None:
    """Refuses a configuration that asks for far more than a model's files hold, before anything of it is made.

    Raises:
        ValueError: Names a tensor, or says how many there are.
    """
    shapes = {tensor: shape for file in _files(folder) for tensor, (_, shape) in _header(file).items()}
    if not shapes or getattr(config, "quantization_config", None) is not None:
        return
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if layers > len(shapes):
        raise ValueError(
            f"model: num_hidden_layers in config.json of {name} is {layers:,}, but its files have only "
            f"{len(shapes):,} tensors; {_REMEDY}"
        )
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(copy.deepcopy(config)).state_dict()
    there = sum(math.prod(shape) for shape in shapes.values())
    if sum(tensor.numel() for tensor in wanted.values()) <= 4 * there:
        # What differs is found with its name when it is loaded.
        return
    for tensor, made in wanted.items():
        if tensor not in shapes or list(made.shape) != shapes[tensor]:
            found = f"is {shapes[tensor]}" if tensor in shapes else "is missing"
            raise ValueError(
                f"model: {tensor} {found} in {_place(name, folder)}, but config.json makes it {list(made.shape)}; "
                f"{_REMEDY}"
            )


def unexplained(name: str, folder: Path | None) -> ValueError:
    """What is wrong with tensors that transformers could not put together and did not name."""
    found = _odd_expert(name, folder)
    return found or ValueError(f"model: the tensors of {name} are not those that config.json describes; {_REMEDY}")


def _odd_expert(name: str, folder: Path | None) -> ValueError | None:
    """An expert's tensor that is missing or differs from the others': in memory all of them are one tensor."""
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for file in _files(folder):
        for tensor, (kind, shape) in _header(file).items():
            found = _EXPERT.fullmatch(tensor)
            if found is not None:
                parts.setdefault((found[1], found[3]), {})[found[2]] = (kind, shape, file)
    for (before, after), experts in sorted(parts.items(), key=lambda each: (each[0][0], -len(each[1]), each[0][1])):
        numbers = {number for (other, _), each in parts.items() if other == before for number in each}
        common = Counter((kind, tuple(shape)) for kind, shape, _ in experts.values()).most_common(1)[0][0]
        for number in sorted(numbers):
            tensor = f"{before}{number}{after}"
            if number not in experts:
                return ValueError(f"model: {tensor} is missing in {_place(name, folder)}; {_REMEDY}")
            kind, shape, file = experts[number]
            if (kind, tuple(shape)) != common:
                return ValueError(
                    f"model: {tensor} in {Path(name) / file.name} is {kind} {list(shape)}, that of the other experts "
                    f"is {common[0]} {list(common[1])}; {_REMEDY}"
                )
    return None


def check_tensors(name: str, folder: Path | None, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuses a model whose files lack a tensor, have one too many, or one of another shape or kind of numbers.

    Tied weights and what transformers itself leaves out for a class are no faults; neither are the layers that some
    checkpoints carry after the last one, which predict several tokens.

    Args:
        name: Of the model, for messages.
        folder: Where its files are.
        model: The model, loaded.
        info: What `from_pretrained(..., output_loading_info=True)` returned with it, mismatched sizes ignored.

    Raises:
        ValueError: Names a tensor, the file and what is wrong, and says how many more there are.
    """
    kinds = {tensor: (kind, file) for file in _files(folder) for tensor, (kind, _) in _header(file).items()}
    mismatched = sorted(tuple(each) for each in info["mismatched_keys"])
    missing = sorted(set(info["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or {}))
    if any(".experts." in tensor for tensor in (*missing, *(tensor for tensor, *_ in mismatched))):
        odd = _odd_expert(name, folder)
        if odd is not None:
            raise odd
    if mismatched:
        tensor, found, wanted = mismatched[0]
        raise ValueError(
            f"model: {tensor} in {_where(name, tensor, kinds, folder)} is {list(found)}, but config.json makes it "
            f"{list(wanted)}{_more(mismatched)}; {_REMEDY}"
        )
    if missing:
        raise ValueError(f"model: {missing[0]} is missing in {_place(name, folder)}{_more(missing)}; {_REMEDY}")
    unexpected = sorted(key for key in info["unexpected_keys"] if not _is_prediction_layer(key, model))
    if unexpected:
        raise ValueError(
            f"model: {unexpected[0]} in {_where(name, unexpected[0], kinds, folder)} is no tensor of the "
            f"{type(model).__name__} that config.json describes{_more(unexpected)}; {_REMEDY}"
        )
    _check_kinds(name, model, kinds)


def _check_kinds(name: str, model: PreTrainedModel, kinds: Mapping[str, tuple[str, Path]]) -> None:
    """Refuses whole numbers where a model computes with fractions: transformers would convert them without a word."""
    if getattr(model.config, "quantization_config", None) is not None:
        return
    wanted = {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    strange = sorted(
        tensor
        for tensor, (kind, _) in kinds.items()
        if kind not in FLOATS and (tensor in wanted or tensor.endswith(".weight"))
    )
    if strange:
        kind, file = kinds[strange[0]]
        raise ValueError(
            f"model: {strange[0]} in {Path(name) / file.name} is stored as {kind}, expected one of "
            f"{', '.join(FLOATS)}, since config.json has no quantization_config{_more(strange)}; {_REMEDY}"
        )


def _is_prediction_layer(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to the layers after the last one, of which a configuration says how many there are."""
    found = re.search(r"\blayers\.(\d+)\.", key)
    config = model.config.get_text_config(decoder=True)
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    return found is not None and 0 <= int(found[1]) - config.num_hidden_layers < extra


def _files(folder: Path | None) -> Iterator[Path]:
    return iter(sorted(folder.glob(WEIGHTS)) if folder is not None else ())


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Each tensor's kind of numbers and shape."""
    with safe_open(file, framework="pt") as opened:
        parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}


def _where(name: str, tensor: str, kinds: Mapping[str, tuple[str, Path]], folder: Path | None) -> str:
    """The file of a tensor; the model where transformers gave it another name than the file has."""
    return str(Path(name) / kinds[tensor][1].name) if tensor in kinds else _place(name, folder)


def _place(name: str, folder: Path | None) -> str:
    """The file that the weights are in; the model where there are several."""
    files = [file.name for file in _files(folder)]
    return str(Path(name) / files[0]) if len(files) == 1 else name


def _more(keys: list[Any]) -> str:
    return f" ({len(keys) - 1} more like it)" if len(keys) > 1 else ""
