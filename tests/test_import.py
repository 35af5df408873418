"""What an operation may import, read from the source, and what importing the operations pulls in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dsa"
FILES = sorted((SOURCE / "ops").rglob("*.py"))

IMPLEMENTATIONS = ("reference", "native", "triton", "vendor")
"""How the files of an operation's implementations begin."""


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where the arrow points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def implementation_of(name: str) -> str | None:
    return next((known for known in IMPLEMENTATIONS if name == known or name.startswith(f"{known}_")), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_operations_need_torch_only(path: Path) -> None:
    own = implementation_of(path.stem)
    allowed = {"torch", "dsa", *sys.stdlib_module_names}
    if own == "triton":
        allowed.add("triton")
    for module in imported(path):
        parts = module.split(".")
        assert parts[0] in allowed, f"{path} imports {module}"
        assert parts[0] != "dsa" or parts[1:2] == ["ops"], f"{path} imports {module}"
        same_operation = parts[:3] == ["dsa", "ops", path.parent.name] and len(parts) > 3
        other = implementation_of(parts[3]) if same_operation and own else None
        assert other in (None, own), f"{path} imports another implementation of its operation, {module}"


def run_fresh(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_operations_pulls_in_nothing_else() -> None:
    run_fresh(
        "import sys, torch; before = set(sys.modules); import dsa.ops; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & {'transformers', 'triton', 'numpy', 'safetensors', 'typer'}, new"
    )


def test_each_operation_can_be_imported_first() -> None:
    names = ["quantize", "quantize.types", "index_topk", "sparse_attention", "dense_attention", "indexer_loss"]
    code = "; ".join(
        f"[sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] == 'dsa']; import dsa.ops.{name}"
        for name in names
    )
    run_fresh(f"import sys, torch; {code}")


def test_importing_the_package_needs_no_compiled_library_and_no_triton() -> None:
    run_fresh(
        "import sys; sys.modules['triton'] = None; import dsa; "
        "from dsa import ops; import torch; "
        "ops.index_topk(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 1), 1)"
    )


SETTINGS = """
import locale, logging, os, random, signal, sys, threading, warnings
import torch
{before}

def settings():
    loggers = {{
        name: (each.level, list(each.handlers), each.propagate, each.disabled)
        for name, each in logging.root.manager.loggerDict.items()
        if isinstance(each, logging.Logger) and name.split(".")[0] != "dsa"
    }}
    return {{
        "warnings": (list(warnings.filters), warnings.showwarning, warnings.formatwarning),
        "threads": ([each.name for each in threading.enumerate()], torch.get_num_threads()),
        "other threads": torch.get_num_interop_threads(),
        "locale": [locale.setlocale(getattr(locale, name)) for name in dir(locale) if name.startswith("LC_")],
        "root logger": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "loggers": loggers,
        "signals": {{number: signal.getsignal(number) for number in signal.valid_signals()}},
        "environment": dict(os.environ),
        "sys.path": (list(sys.path), list(sys.path_hooks), os.getcwd()),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "random numbers": (random.getstate(), torch.initial_seed(), torch.get_rng_state().tolist()),
        "torch": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
        ),
    }}

before = settings()
{imports}
after = settings()
changed = [name for name in before if name != "loggers" and after[name] != before[name]]
changed += [name for name in before["loggers"] if after["loggers"][name] != before["loggers"][name]]
assert not changed, {{name: (before.get(name), after.get(name)) for name in changed}}
"""


@pytest.mark.parametrize(
    ("before", "imports"),
    [
        ("", "import dsa, dsa.ops"),
        # What transformers and torch set as they load is theirs.
        (
            "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
            "import dsa; dsa.attach; dsa.open",
        ),
    ],
    ids=["alone", "after transformers"],
)
def test_importing_the_package_changes_no_setting_of_the_host(before: str, imports: str) -> None:
    run_fresh(SETTINGS.format(before=before, imports=imports))
