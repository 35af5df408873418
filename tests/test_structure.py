"""What holds for the whole source: no circle of imports, arrows that point down, and functions that can be read.

Everything is read from the syntax tree, so that imports inside functions count like those at the top of a file.
Imports under `TYPE_CHECKING` do not count: they never run.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dsa"

FLOORS = (
    {"config", "text"},
    {"documents"},
    {"runs"},
    {"cost"},
    {"ops"},
    {"modules"},
    {"models"},
    {"_auto_classes"},
    {"store"},
    {"generation"},
    {"dsa"},
    {"eval"},
    {"train"},
    {"report", "bench", "calibrate", "check", "serve"},
    {"cli"},
    {"__main__"},
    {"testing"},
)
"""Folders and single files of the package, from the lowest floor up; `dsa` is the package's own `__init__.py`.

A file imports its own folder and lower floors. Two names of one floor do not import each other.
"""

MOST_PARAMETERS = 12
"""Of a public function or method, `self` and `cls` not counted. Exempt are Triton kernels, and operations, which an
`ops/<op>/api.py` defines: they take tensors and constants one by one."""

MOST_LINES = 80
"""From the first statement after the docstring to the last line. Only Triton kernels (`@jit`) are exempt."""

KERNEL_PLACES = {
    "bench/caches.py",
    "bench/result.py",
    "cli/bench_table.py",
    "cli/info.py",
    "testing/cases.py",
    "testing/counting.py",
    "testing/fuzz/__main__.py",
    "testing/fuzz/draw.py",
    "testing/fuzz/projection.py",
    "testing/fuzz/quantizing.py",
    "testing/fuzz/run.py",
}
"""Files outside `ops` that may say "native": each means the compiled kernels, and nothing else may be called so."""


class Problem(NamedTuple):
    """One thing that breaks a rule: which rule, and where."""

    rule: str
    where: str


class Tree:
    """The Python files of a package, and which of them import which."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {self._module_of(path): path for path in sorted(root.rglob("*.py"))}
        self.syntax = {module: ast.parse(path.read_text(), str(path)) for module, path in self.files.items()}
        self.imports = {module: set(self._imported(module)) - {module} for module in self.files}

    def _module_of(self, path: Path) -> str:
        parts = path.relative_to(self.root.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imported(self, module: str) -> Iterator[str]:
        """The package's modules that a file imports anywhere in it, as far as names can be read."""
        for node in walk_at_run_time(self.syntax[module]):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.files)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(module, node)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    name = inner if inner in self.files else base
                    if name in self.files:
                        yield name
            elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
                yield from self._named(node.args[0])

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        parts = module.split(".")
        is_package = self.files[module].name == "__init__.py"
        kept = parts[: len(parts) - node.level + is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def _named(self, name: ast.expr) -> Iterator[str]:
        """The modules of an `import_module`: the one of a whole literal, all below the literal start of an f-string."""
        if isinstance(name, ast.Constant):
            yield from (module for module in self.files if module == name.value)
        elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
            start = str(name.values[0].value)
            yield from (module for module in self.files if "." in start and module.startswith(start))

    def folder(self, module: str) -> str:
        """The folder or single file of the package that a module lies in."""
        parts = module.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    def path(self, module: str) -> str:
        return str(self.files[module].relative_to(self.root))


def walk_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from walk_at_run_time(other)
        else:
            yield from walk_at_run_time(child)


def called_name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def reached(imports: Mapping[str, set[str]], start: str) -> set[str]:
    """Everything that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in imports[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def circles(tree: Tree) -> Iterator[Problem]:
    """Every import inside a strongly connected component of the graph of files."""
    below = {module: reached(tree.imports, module) for module in tree.files}
    for module, targets in tree.imports.items():
        yield from (Problem("circle", f"{module} -> {target}") for target in sorted(targets) if module in below[target])


def unranked(tree: Tree) -> Iterator[Problem]:
    """Folders and single files that have no floor."""
    ranked = set().union(*FLOORS)
    yield from (Problem("no floor", name) for name in sorted({tree.folder(module) for module in tree.files} - ranked))


def climbing(tree: Tree) -> Iterator[Problem]:
    """Imports of a higher floor, or of another room on the same one; nothing outside `testing` imports `testing`."""
    rank = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module, targets in tree.imports.items():
        own = tree.folder(module)
        for target in sorted(targets):
            other = tree.folder(target)
            if own != other and own in rank and other in rank and rank[own] <= rank[other]:
                yield Problem("climbs", f"{module} -> {target}")


def relative_imports(tree: Tree) -> Iterator[Problem]:
    """Relative imports hide where the arrow points."""
    for module, syntax in tree.syntax.items():
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(syntax)):
            yield Problem("relative import", module)


def functions(node: ast.AST, prefix: str = "", public: bool = True) -> Iterator[tuple[str, bool, ast.FunctionDef]]:
    """Every function with its dotted name, and whether others may call it: not nested, no leading underscore."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            special = child.name.startswith("__") and child.name.endswith("__")
            seen = public and (special or not child.name.startswith("_"))
            name = f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from functions(child, f"{name}.", seen)
            else:
                yield name, seen, child
                yield from functions(child, f"{name}.", False)
        else:
            yield from functions(child, prefix, public)


def parameters(function: ast.FunctionDef) -> int:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [each.arg for each in (given.vararg, given.kwarg) if each is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def body_lines(function: ast.FunctionDef) -> int:
    documented = ast.get_docstring(function, clean=False) is not None
    body = function.body[documented:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def is_kernel(function: ast.FunctionDef) -> bool:
    names = {ast.unparse(each.func if isinstance(each, ast.Call) else each) for each in function.decorator_list}
    return bool(names & {"triton.jit", "jit"})


def many_parameters(tree: Tree) -> Iterator[Problem]:
    """Public functions with more than `MOST_PARAMETERS` parameters, operations and kernels aside."""
    for module, syntax in tree.syntax.items():
        where = tree.path(module)
        if re.fullmatch(r"ops/\w+/api\.py", where):
            continue
        for name, public, function in functions(syntax):
            if public and parameters(function) > MOST_PARAMETERS and not is_kernel(function):
                yield Problem("parameters", f"{where}:{name}")


def long_bodies(tree: Tree) -> Iterator[Problem]:
    """Functions whose bodies have more than `MOST_LINES` lines, Triton kernels aside."""
    for module, syntax in tree.syntax.items():
        for name, _, function in functions(syntax):
            if body_lines(function) > MOST_LINES and not is_kernel(function):
                yield Problem("lines", f"{tree.path(module)}:{name}")


def native_elsewhere(tree: Tree) -> Iterator[Problem]:
    """Files outside `ops` that use the word "native", alone or as a part of a name, without meaning the kernels.

    The module `native_support` and the library's folder `_native` may be named anywhere.
    """
    for module, path in tree.files.items():
        words = re.sub(r"\bnative_support\b|\b_native\b", "", path.read_text())
        where = tree.path(module)
        said = re.search(r"(?<![A-Za-z])native(?![a-z])|Native(?![a-z])|(?<![A-Za-z])NATIVE(?![A-Z])", words)
        in_name = re.search(r"(^|[/_])native([/_.]|$)", where)
        if (said or in_name) and tree.folder(module) != "ops" and where not in KERNEL_PLACES:
            yield Problem("native", where)


CHECKS = (circles, unranked, climbing, relative_imports, many_parameters, long_bodies, native_elsewhere)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_keeps_the_rule(check: Callable[[Tree], Iterator[Problem]]) -> None:
    found = sorted(check(Tree(SOURCE)))
    assert not found, "\n".join(f"{problem.rule}: {problem.where}" for problem in found)


def made_up(root: Path, files: Mapping[str, str]) -> Tree:
    """A package `dsa` of those files and the `__init__.py` of their folders."""
    for name, text in files.items():
        path = root / "dsa" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return Tree(root / "dsa")


GOOD = {
    "ops/plain.py": "import torch\n",
    "models/a.py": "from dsa.ops.plain import x\nfrom dsa.config import y\n",
    "models/b.py": "def f():\n    from dsa.models import a\n",
    "config.py": "",
}


def test_a_tree_without_faults_passes(tmp_path: Path) -> None:
    assert [problem for check in CHECKS for problem in check(made_up(tmp_path, GOOD))] == []


@pytest.mark.parametrize(
    "back",
    [
        "import dsa.models.b\n",
        "from dsa.models.b import f\n",
        "from dsa.models import b\n",
        "def g():\n    from dsa.models.b import f\n",
        "class C:\n    def g(self):\n        if self:\n            import dsa.models.b\n",
        "from importlib import import_module\nimport_module('dsa.models.b')\n",
        "import importlib\ndef g(name):\n    return importlib.import_module(f'dsa.models.{name}')\n",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import dsa.models.b\n",
    ],
)
def test_a_circle_is_found(tmp_path: Path, back: str) -> None:
    tree = made_up(tmp_path, GOOD | {"models/a.py": back})
    assert set(circles(tree)) == {
        Problem("circle", "dsa.models.a -> dsa.models.b"),
        Problem("circle", "dsa.models.b -> dsa.models.a"),
    }


def test_a_circle_over_three_files_and_two_folders_is_found(tmp_path: Path) -> None:
    tree = made_up(tmp_path, GOOD | {"config.py": "def f():\n    import dsa.models.b\n"})
    assert len(list(circles(tree))) == 3
    assert list(climbing(tree)) == [Problem("climbs", "dsa.config -> dsa.models.b")]


def test_a_circle_through_a_package_is_found(tmp_path: Path) -> None:
    tree = made_up(tmp_path, {"models/a.py": "from dsa.models import name\n"})
    (tmp_path / "dsa" / "models" / "__init__.py").write_text("from dsa.models.a import name\n")
    assert len(list(circles(tree))) == 0
    assert len(list(circles(Tree(tmp_path / "dsa")))) == 2


def test_imports_for_types_only_do_not_count(tmp_path: Path) -> None:
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dsa.models.b import f\n"
    assert list(circles(made_up(tmp_path, GOOD | {"models/a.py": back}))) == []


@pytest.mark.parametrize(
    ("name", "text", "target"),
    [
        ("ops/up.py", "from dsa.models import a\n", "dsa.models.a"),
        ("models/up.py", "def f():\n    from dsa.testing.cases import CASES\n", "dsa.testing.cases"),
        ("cost/up.py", "import dsa.models.a\n", "dsa.models.a"),
        ("documents/up.py", "from dsa.runs import files\n", "dsa.runs"),
        ("cli/up.py", "import dsa.testing.cases\n", "dsa.testing.cases"),
        ("bench/up.py", "from dsa.report.page import page\n", "dsa.report.page"),
        ("models/up.py", "import dsa\n", "dsa"),
    ],
)
def test_a_climbing_import_is_found(tmp_path: Path, name: str, text: str, target: str) -> None:
    others = {"testing/cases.py": "", "report/page.py": "", "runs/__init__.py": "", name: text}
    (problem,) = climbing(made_up(tmp_path, GOOD | others))
    assert problem.rule == "climbs"
    assert problem.where.endswith(f" -> {target}")


def test_a_folder_without_a_floor_and_a_relative_import_are_found(tmp_path: Path) -> None:
    tree = made_up(tmp_path, GOOD | {"attic/old.py": "", "lonely.py": "", "models/c.py": "from . import a\n"})
    assert [problem.where for problem in unranked(tree)] == ["attic", "lonely"]
    assert list(relative_imports(tree)) == [Problem("relative import", "dsa.models.c")]
    assert "dsa.models.a" in tree.imports["dsa.models.c"]


def test_many_parameters_are_found(tmp_path: Path) -> None:
    twelve = ", ".join(f"p{number}" for number in range(MOST_PARAMETERS))
    text = f"def kept({twelve}): ...\ndef much({twelve}, *, more): ...\ndef _own({twelve}, more): ...\n"
    text += f"class C:\n    def __init__(self, {twelve}): ...\n    def call(self, {twelve}, **more): ...\n"
    kernel = f"@triton.jit\ndef kernel({twelve}, more): ...\n"
    tree = made_up(tmp_path, {"models/a.py": text, "ops/b/api.py": text, "ops/b/triton.py": kernel + text})
    found = [f"{name}:{function}" for name in ("models/a.py", "ops/b/triton.py") for function in ("much", "C.call")]
    assert [problem.where for problem in many_parameters(tree)] == found


def test_long_bodies_are_found(tmp_path: Path) -> None:
    def function(head: str, lines: int) -> str:
        return f"{head}\n    'A docstring\\n\\\n    of two lines.'\n" + "    x = 1\n" * lines

    text = function("def kept():", MOST_LINES) + function("async def _long():", MOST_LINES + 1)
    text += function("@triton.jit\ndef kernel():", MOST_LINES + 1)
    tree = made_up(tmp_path, {"ops/a.py": text})
    assert [problem.where for problem in long_bodies(tree)] == ["ops/a.py:_long"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# a native model\n", True),
        ("is_native = 1\n", True),
        ("NativeFamily = NATIVE_FAMILIES = 1\n", True),
        ("# alternatives, natively\nfrom dsa.ops import native_support\n", False),
    ],
)
def test_the_word_native_is_found(tmp_path: Path, text: str, found: bool) -> None:
    tree = made_up(tmp_path, {"models/a.py": text, "ops/a.py": text, "testing/cases.py": text})
    assert list(native_elsewhere(tree)) == [Problem("native", "models/a.py")] * found
    assert list(native_elsewhere(made_up(tmp_path / "b", {"models/native/a.py": ""})))
