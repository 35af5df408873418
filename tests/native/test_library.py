"""The library of compiled kernels: how it is found, refused, chosen and shared among threads and processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsa.ops import native_support, quantize_index_keys

pytestmark = pytest.mark.skipif(native_support.missing() is not None, reason="no compiled kernels")

KEYS = torch.randn(1, 1500, 8, generator=torch.Generator().manual_seed(0))
"""Enough for several pieces of work."""

PREAMBLE = """
import os, sys, warnings
import torch
from dsa.ops import native_support, quantize_index_keys
keys = torch.randn(1, 1500, 8, generator=torch.Generator().manual_seed(0))
"""


def fresh(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own, with none of the variables that choose something but those given."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("DSA_") or name == "DSA_CACHE"
    }
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def printed(program: str, **environment: str) -> str:
    result = fresh(program, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="reads symbols with nm")
def test_exports_its_interface_and_nothing_else() -> None:
    """Anything else, such as the C++ runtime inside, could be mixed up with what the process has already."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", native_support.library()._name], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert "dsa_abi_version" in names
    assert [name for name in names if not name.startswith("dsa_")] == []


def test_the_environment_chooses_the_instruction_set() -> None:
    for isa in native_support.isas():
        assert printed("print(native_support.isa())", DSA_ISA=isa) == isa
    assert printed("print(native_support.isa())") == native_support.isas()[0]


def test_an_unknown_instruction_set_is_refused() -> None:
    result = fresh("quantize_index_keys(keys)", DSA_ISA="abacus")
    assert "ValueError: DSA_ISA=abacus is not an instruction set of this machine; use one of" in result.stderr
    assert "baseline" in result.stderr
    with pytest.raises(ValueError, match=r"'abacus' is none of this machine's instruction sets, .*baseline"):
        native_support.set_isa("abacus")


def test_unknown_threads_are_refused() -> None:
    result = fresh("quantize_index_keys(keys)", DSA_THREADS_FROM="elsewhere")
    assert "ValueError: DSA_THREADS_FROM must be torch or own, got elsewhere" in result.stderr


def test_a_library_that_is_not_there_is_refused() -> None:
    result = fresh("quantize_index_keys(keys)", DSA_NATIVE_LIBRARY="/nowhere/libdsa_native.so")
    assert "ValueError: DSA_NATIVE_LIBRARY=/nowhere/libdsa_native.so is not a file; unset it" in result.stderr


WITHOUT_KERNELS = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        data = quantize_index_keys(keys).data
print([str(warning.message) for warning in caught if "kernels" in str(warning.message)])
try:
    quantize_index_keys(keys, impl="native")
except NotImplementedError as error:
    print(error)
assert torch.equal(data, quantize_index_keys(keys, impl="reference").data)
"""


def test_without_kernels_the_reference_runs_and_says_so_once() -> None:
    out = printed("native_support._FILE_NAMES[sys.platform] = 'none.so'" + WITHOUT_KERNELS)
    warning, refusal = out.splitlines()
    assert warning.count("dsa runs without its CPU kernels") == 1
    assert "made without a C++ compiler" in warning
    assert "install dsa-attention again" in warning
    assert "impl='native' cannot run this: this installation was made without a C++ compiler" in refusal


def test_a_library_of_another_version_is_not_used() -> None:
    out = printed("native_support.ABI_VERSION += 1" + WITHOUT_KERNELS)
    assert out.count("built from other sources") == 2


def test_a_file_that_is_no_library_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "libdsa_native.so"
    file.write_text("not a library")
    assert printed(WITHOUT_KERNELS, DSA_NATIVE_LIBRARY=str(file)).count("cannot be loaded") == 2


@pytest.mark.parametrize("threads_from", ["torch", "own"])
def test_calls_from_several_threads_at_once(threads_from: str) -> None:
    program = """
import threading
torch.set_num_threads(3)
expected = quantize_index_keys(keys, impl="reference").data
wrong = []
def work():
    for _ in range(100):
        if not torch.equal(quantize_index_keys(keys, impl="native").data, expected):
            wrong.append(1)
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(len(wrong))
"""
    assert printed(program, DSA_THREADS_FROM=threads_from) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("threads_from", ["torch", "own"])
def test_a_forked_child_can_call_kernels(threads_from: str) -> None:
    program = """
torch.set_num_threads(3)
expected = quantize_index_keys(keys, impl="native").data
child = os.fork()
same = torch.equal(quantize_index_keys(keys, impl="native").data, expected)
if child == 0:
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
"""
    assert printed(program, DSA_THREADS_FROM=threads_from) == "0 True"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
@pytest.mark.parametrize("threads_from", ["torch", "own"])
def test_threads_follow_torch(threads_from: str) -> None:
    program = """
def count():
    quantize_index_keys(keys, impl="native")
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before = count()
torch.set_num_threads(3)
print(count() - before)
"""
    assert printed(program, DSA_THREADS_FROM=threads_from) == "2"


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(quantize_index_keys(KEYS, impl="native").data)
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
