"""Lets transformers' Auto classes find dsa's classes, and imports nothing of transformers or of ours until they do.

`import dsa` must cost nothing and change nothing: neither what is imported nor in which order. transformers' modules
import each other in circles, so no code of ours may import one of them while another is being imported. Therefore
nothing is registered ahead of time. In transformers' tables of registered classes, a look-up of `dsa_llama` or of
its configuration class makes the class at that moment; every other look-up is answered as before. The tables are
prepared when the modules that hold them have been imported: a finder notices those two imports, leaves their loaders
to do their work, and then exchanges a dictionary.

PEFT has tables by `model_type`, too: which layers an adapter goes to where its configuration names none. There the
types of ours that exist get the row of their family, when the type is made or PEFT is imported, whichever is later.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "dsa_"
"""How the `model_type` of an attached model begins."""

_HOME = "dsa.models.saving"
_REGISTERED = "_extra_content"
"""Attribute of transformers' tables that holds what `AutoConfig.register` and its like were given."""


def _config_class(key: object) -> type | None:
    """The configuration class of a `model_type` that is ours."""
    if not isinstance(key, str) or not key.startswith(PREFIX):
        return None
    saving = importlib.import_module(_HOME)
    model_type = key.removeprefix(PREFIX)
    return saving.dsa_config_class(model_type) if model_type in saving.ATTACHABLE else None


def _model_class(key: object) -> type | None:
    """The model class of a configuration class that is ours."""
    if getattr(key, "__module__", None) != _HOME:
        return None
    model_type = str(getattr(key, "model_type", ""))
    if _config_class(model_type) is not key:
        return None
    return importlib.import_module(_HOME).dsa_model_class(model_type.removeprefix(PREFIX))


def _decoder_class(key: object) -> type | None:
    """The class of a decoder without its head, of a configuration class that is ours."""
    if _model_class(key) is None:
        return None
    model_type = str(getattr(key, "model_type", ""))
    return importlib.import_module(_HOME).dsa_decoder_class(model_type.removeprefix(PREFIX))


_TABLES: Mapping[str, tuple[tuple[str, Callable[[object], type | None]], ...]] = {
    "transformers.models.auto.configuration_auto": (("CONFIG_MAPPING", _config_class),),
    "transformers.models.auto.modeling_auto": (
        ("MODEL_FOR_CAUSAL_LM_MAPPING", _model_class),
        ("MODEL_MAPPING", _decoder_class),
    ),
}

_ADAPTER_TARGETS = "peft.utils.constants"


class _Registered(dict[Any, Any]):
    """Registered classes. Ours are made when they are looked up; until then they are not among keys and values."""

    def __init__(self, registered: Mapping[Any, Any], make: Callable[[object], type | None]) -> None:
        super().__init__(registered)
        self._make = make

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._make(key) is not None

    def __missing__(self, key: object) -> Any:
        made = self._make(key)
        if made is None:
            raise KeyError(key)
        return self.setdefault(key, made)


def _prepare(name: str) -> None:
    """Prepares the tables of a module that has been imported; a module without such tables is left alone."""
    if name == _ADAPTER_TARGETS:
        saving = sys.modules.get(_HOME)
        if saving is not None and hasattr(saving, "share_adapter_targets"):
            saving.share_adapter_targets()
        return
    for attribute, make in _TABLES[name]:
        table = getattr(sys.modules.get(name), attribute, None)
        registered = getattr(table, _REGISTERED, None)
        if isinstance(registered, dict) and getattr(registered, "_make", None) is not make:
            setattr(table, _REGISTERED, _Registered(registered, make))


class _ThenPrepare(Loader):
    """A module's own loader; when it has run, the table is prepared. The module never sees anything but its own."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _prepare(module.__name__)


class _TableFinder(MetaPathFinder):
    """Finds the modules with tables as the finders after it do, and has their tables prepared."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(("transformers.", "peft.")):
            return None
        for name in (*_TABLES, _ADAPTER_TARGETS):
            # One that another finder took before this one saw it, or that was half imported when dsa was.
            _prepare(name)
        if fullname not in _TABLES and fullname != _ADAPTER_TARGETS:
            return None
        finders = list(sys.meta_path)
        position = finders.index(self) + 1 if self in finders else len(finders)
        for finder in finders[position:]:
            find_spec = getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _ThenPrepare(spec.loader)
                return spec
        return None


def find_when_looked_up() -> None:
    """Prepares the tables that exist, and has the others prepared when they come to exist."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.insert(0, _TableFinder())
    for name in _TABLES:
        module = sys.modules.get(name)
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            # Another thread is importing it; where it is this one, nothing waits, and the finder sees to it later.
            importlib.import_module(name)
        _prepare(name)
