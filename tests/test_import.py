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
