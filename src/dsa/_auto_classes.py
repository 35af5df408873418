"""Registers dsa's model classes with transformers' Auto classes when those are imported.

Registering at `import dsa` would import transformers: seconds that `dsa --help` and users of the operations alone
should not pay. So an import hook watches for the modules that hold the Auto classes. transformers' modules import
each other in circles; registering needs complete ones, so it happens when the outermost watched import is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_WATCHED = (_CONFIGS, _MODELS, "transformers.modeling_utils", "transformers.generation.utils")

_pending = {_CONFIGS, _MODELS}
_open_imports = 0


class _ThenRegister(Loader):
    """Runs a watched module's own loader, then registers what can be."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        global _open_imports
        _open_imports += 1
        try:
            self._loader.exec_module(module)
            if _open_imports == 1:
                _register()
        finally:
            _open_imports -= 1


class _WatchingFinder(MetaPathFinder):
    """Finds the watched modules the usual way and wraps their loaders."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED or self._searching:
            return None
        self._searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def _register() -> None:
    # Registering the configurations may import the models' Auto module: ask again after each.
    if _CONFIGS in _pending and _CONFIGS in sys.modules:
        from dsa.models.saving import register_configs

        _pending.discard(_CONFIGS)
        register_configs()
    if _MODELS in _pending and _MODELS in sys.modules:
        from dsa.models.saving import register_models

        _pending.discard(_MODELS)
        register_models()


def register_when_imported() -> None:
    """Registers now with what transformers has imported already, and with the rest when it is imported."""
    _register()
    if not any(isinstance(finder, _WatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchingFinder())
