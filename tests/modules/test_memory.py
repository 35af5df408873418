"""Memory for caches: tensors like any other, placed where scattered reads are cheap."""

import sys
from pathlib import Path

import pytest
import torch

from dsa.modules import memory
from dsa.modules.cache import IndexedLayer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens", [1, 3000, 40_001])
def test_is_an_ordinary_tensor(dtype: torch.dtype, tokens: int) -> None:
    shape = (1, tokens, 3, 65)
    placed = memory.empty(shape, dtype)
    assert placed.shape == shape
    assert placed.dtype == dtype
    assert placed.is_contiguous()
    placed.fill_(3)
    assert torch.equal(placed.clone(), torch.full(shape, 3, dtype=dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for huge pages")
def test_large_buffers_begin_at_a_huge_page_and_ask_for_them() -> None:
    layer = IndexedLayer()
    for tokens in (1, 4095, 4097):  # grows from a small buffer to a large one
        key = torch.ones(1, 4, tokens, 128)
        layer.update(key, key)
    assert layer.keys is not None
    assert torch.equal(layer.keys, torch.ones(1, 4, 8193, 128))
    where = layer.keys.data_ptr()
    assert where % memory.HUGE_PAGE == 0
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no huge pages")
    here, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            here = begin <= where < end
        elif here and line.startswith("VmFlags"):
            flags = line
    assert "hg" in flags.split()


def test_other_devices_get_what_torch_gives() -> None:
    assert memory.empty((1, 1 << 24), torch.float32, "meta").device.type == "meta"
