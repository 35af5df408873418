"""Loading a causal language model and its tokenizer: a Hub id, a local directory, or the embedded default.

The default's own file, and its copy in the cache, are those of `default_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from dsa.models.attached import is_attached, set_trained
from dsa.models.config_file import check_json_files
from dsa.models.default_model import DEFAULT_MODEL, Status, default_gguf, default_model_dir
from dsa.models.gguf_model import checked_header, is_gguf, read_model, settings_folder
from dsa.models.rope import RopeScaling, extend_positions
from dsa.models.tensors import check_sizes, check_tensors, damaged_file, folder_of, unexplained
from dsa.ops import native_support
from dsa.runs.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from dsa.models.packing import PackReport

CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")

ChooseScaling = Callable[["PreTrainedConfig", Any], RopeScaling | None]
"""Chooses a RoPE scaling by configuration and tokenizer, before there is a model."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Args:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: What was asked for.
        is_default: Whether this is the embedded model, for which trained indexers are shipped.
        packed: Which weights are stored in fewer bits; `None` where none are.
    """

    model: Any
    tokenizer: Any
    name: str
    is_default: bool
    packed: PackReport | None = None


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: str | torch.device | None = None,
    status: Status | None = None,
    rope_scaling: RopeScaling | ChooseScaling | None = None,
    place: bool = True,
    random_seed: int | None = None,
    weights: str | None = None,
) -> LoadedModel:
    """Loads a causal language model. Weights are read from safetensors only.

    Args:
        name: `"default"`, a directory, a GGUF file, whose blocks are kept, or a Hub id.
        dtype: Of the weights. `None` means fp32 on a CPU, where narrower matrix products are slower without
            AMX or AVX512-BF16, and the checkpoint's own dtype elsewhere; `"auto"` means that one everywhere.
        device: `None` means CUDA where there is one, else the CPU.
        status: Called with what takes long: converting the default model, or reading a checkpoint.
        rope_scaling: For texts longer than the model's positions, as `dsa.models.rope.parse_scaling` returns it; or
            what chooses it, see `dsa.models.extension.chosen_scaling`.
        place: Put the weights on the device; otherwise they stay on the CPU, for callers that move them in parts.
        random_seed: Make random weights from this seed, as transformers does it, in place of the checkpoint's:
            only its configuration and tokenizer are read. `dtype=None` and `"auto"` then mean fp32.
        weights: A form of `dsa.pack_weights`, or `"auto"`; `None` leaves them as they are stored. With `"auto"` and
            `"int4"` the default model keeps the blocks of its own file.

    Raises:
        OSError: No such directory or Hub id, no network, no safetensors, or the cache cannot be written.
        ValueError: Not a causal language model, no tokenizer with it, or no such device.
        ImportError: The default model's package, or what reads it, is not installed.
    """
    tell = status or (lambda message: None)
    target = _device(device)
    is_default = name == DEFAULT_MODEL
    file = _gguf_file(name, weights)
    header = None
    if file is not None:
        if target.type != "cpu":
            raise ValueError(
                f"device: the blocks of {file.name} are multiplied on the CPU, got {target}; use --device cpu"
            )
        header = checked_header(file)
        source: str | Path = settings_folder(file, header, tell)
    else:
        source = default_model_dir(tell) if is_default else _resolve(name)
    tell(f"Loading {name}")
    with quiet_transformers():
        config = _check_causal(name, source)
        tokenizer = _read_tokenizer(name, source)
        if callable(rope_scaling):
            rope_scaling = rope_scaling(config, tokenizer)
        if rope_scaling is not None:
            extend_positions(config, rope_scaling)
        if random_seed is not None:
            model = _random_weights(config, dtype, random_seed)
            return LoadedModel((model.to(target) if place else model).eval(), tokenizer, name, is_default)
        if dtype is None:
            dtype = torch.float32 if target.type == "cpu" else None
        if file is not None and header is not None:
            model = read_model(file, header, config)
            weights = None if is_default else weights
        else:
            model = _read_weights(name, source, dtype, config, given=rope_scaling is not None)
    model = (model.to(target) if place else model).eval()
    return LoadedModel(model, tokenizer, name, is_default, _packed(model, weights))


def _gguf_file(name: str, weights: str | None) -> Path | None:
    """The GGUF file that the weights are read from; the default model's own where its blocks are wanted."""
    if name == DEFAULT_MODEL:
        return default_gguf() if weights in ("auto", "int4") and native_support.gap() is None else None
    path = Path(name).expanduser()
    if not is_gguf(name) or path.is_dir():
        return None
    if not path.is_file():
        raise OSError(f"model: there is no file {name}; expected a GGUF file, a local directory, a Hub id or 'default'")
    return path


def _packed(model: PreTrainedModel, weights: str | None) -> PackReport | None:
    """Stores the weights as asked for, and says how they are stored where some are packed."""
    from dsa.models.packing import pack_weights, report_on, weight_bytes

    if weights in (None, "auto"):
        report = report_on(model, "as stored", weight_bytes(model))
    else:
        report = pack_weights(model, cast("Any", weights))
    return report if report.formats else None


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:<number>', got {device!r}") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: torch {torch.__version__} finds no {device} here; use 'cpu', or see `dsa info`")
    return target


def _resolve(name: str) -> str:
    """A directory's path, or the Hub id as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OSError(f"model: {name} is a directory without config.json; expected what `save_pretrained` writes")
        check_json_files(path)
        return str(path)
    if path.exists():
        raise OSError(
            f"model: {name} is a file; expected a GGUF file, a directory that `save_pretrained` wrote, a Hub id or "
            "'default'"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise OSError(f"model: there is no directory {name}; expected a local directory, a Hub id or 'default'")
    return name


def read_config(name: str) -> PreTrainedConfig:
    """A causal language model's configuration alone; code that comes with it is not run.

    Args:
        name: Local directory, its config.json, or Hub id.

    Raises:
        OSError: No such directory or Hub id, or no network.
        ValueError: Not a causal language model's, one that transformers cannot read, or one of a class that comes with
            the model as code.
    """
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return read_config(str(path.absolute().parent))
    with quiet_transformers():
        return _check_causal(
            name, str(default_model_dir(lambda message: None)) if name == DEFAULT_MODEL else _resolve(name)
        )


def _check_causal(name: str, source: str | Path) -> PreTrainedConfig:
    """The model's configuration, if it is a causal language model's."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        # Code that comes with a model is never run, and nobody is asked whether it may.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise _not_loaded(name, error) from error
    except Exception as error:
        # Whatever transformers' own readers trip over in a file that others wrote.
        raise ValueError(
            f"model: {name} has a configuration that transformers cannot read: {_in_a_line(error)}"
        ) from error
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        mapped = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        classes = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
        saved = config.architectures or []
        causal = {cls.__name__ for cls in classes if cls is not None}
        if not saved or any(each in causal or each.endswith(CAUSAL_SUFFIXES) for each in saved):
            return config
    found = ", ".join(config.architectures or [type(config).__name__])
    raise ValueError(
        f"model: {name} is not a causal language model (it is {found}, model type {config.model_type!r}); "
        "encoders and encoder-decoders have no causal attention to make sparse: use a decoder such as a Llama or Qwen"
    )


def _read_weights(
    name: str, source: str | Path, dtype: torch.dtype | Literal["auto"] | None, config: PreTrainedConfig, given: bool
) -> Any:
    """The model; with `given`, made from this configuration instead of the one next to the weights."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"config": config} if given else {}
    try:
        check_sizes(name, folder_of(source), config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            use_safetensors=True,
            # What transformers does not find or cannot use, it makes up: `check_tensors` refuses that.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        model, info = loaded
        check_tensors(name, folder_of(source), model, info)
    except SafetensorError as error:
        damaged = damaged_file(folder_of(source))
        raise OSError(
            f"model: the weights of {name} are damaged{damaged} ({error}); copy or download them again"
        ) from error
    except OSError as error:
        raise _not_loaded(name, error) from error
    except RuntimeError as error:
        raise unexplained(name, folder_of(source)) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"model: the configuration of {name} makes no model: {_in_a_line(error)}") from error
    return model


def _random_weights(config: PreTrainedConfig, dtype: torch.dtype | Literal["auto"] | None, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)
    if is_attached(model):
        set_trained(model, False)
    return model


def _read_tokenizer(name: str, source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ValueError(
            f"model: no tokenizer could be read with {name} ({_in_a_line(error)}); "
            "save it next to the weights with `tokenizer.save_pretrained(directory)`"
        ) from error


def _not_loaded(name: str, error: OSError) -> OSError:
    reason = str(error)
    if "connect" in reason or "offline" in reason.lower():
        hint = "there is no local directory of that name and the Hub cannot be reached: check the name or the network"
    elif Path(name, "config.json").is_file() and not _has_weights(Path(name)):
        hint = "a configuration without weights; `dsa train --stage dense --from-scratch` begins with random ones"
    elif "safetensors" in reason:
        hint = "only safetensors weights are read, never pickle: save it again with `model.save_pretrained(directory)`"
    else:
        hint = "expected a local directory that `save_pretrained` wrote, a Hub id or 'default'"
    return OSError(f"model: {name} could not be loaded: {_first_line(error)} ({hint})")


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin"))


def _in_a_line(error: BaseException) -> str:
    """A library's error on one line; with its kind where that says more."""
    said = " ".join(str(error).split())[:300] or "no reason given"
    return said if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {said}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
