"""Libraries of hardware makers, played by small modules that have the published functions and compute them in torch."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa.ops import (
    PackedLatents,
    PagedLatents,
    index_topk,
    pack_latents,
    quantize_index_keys,
    sparse_attention,
    vendor_support,
)
from dsa.ops.triton_support import Choices

CPU = torch.device("cpu")


class FlashMLA(ModuleType):
    """`flash_mla` with its conditions: heads, dims, places, pages, dtypes; `lse` to base 2 in prefill."""

    def __init__(self, wrong: float = 0.0, prefill_base: float = 2.0) -> None:
        super().__init__("flash_mla")
        self.wrong, self.prefill_base, self.calls = wrong, prefill_base, 0

    def attend(self, q: Tensor, rows: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        assert q.dtype == torch.bfloat16
        assert q.is_contiguous()
        assert q.shape[-2] in (64, 128)
        assert q.shape[-1] == 576
        assert indices.dtype == torch.int32
        assert indices.is_contiguous()
        assert indices.shape[-1] % 128 == 0
        # Out of range it would read anything.
        assert int(indices.min()) >= -1
        assert int(indices.max()) < rows.shape[0]
        key = rows[indices.clamp_min(0).long()].float()
        scores = torch.einsum("...hd,...kd->...hk", q.float(), key) * scale
        scores = scores.masked_fill((indices < 0).unsqueeze(-2), -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out = torch.einsum("...hk,...kd->...hd", weights, key[..., :512]) + self.wrong
        lse = scores.logsumexp(-1)
        # A query without tokens gets +inf.
        return out.bfloat16(), lse.masked_fill(lse == -torch.inf, torch.inf)

    def flash_mla_sparse_fwd(self, q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = 512) -> Any:
        assert kv.dtype == torch.bfloat16
        assert kv.shape[1:] == (1, 576)
        assert indices.shape[1] == 1
        assert d_v == 512
        out, lse = self.attend(q, kv[:, 0], indices[:, 0], sm_scale)
        return out, torch.empty(0), lse / math.log(self.prefill_base)

    def get_mla_metadata(self, *args: Any) -> tuple[str, None]:
        return "plan", None

    def flash_mla_with_kvcache(
        self, q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
        tile_scheduler_metadata: Any, num_splits: Any, softmax_scale: float, causal: bool, is_fp8_kvcache: bool,
        indices: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert k_cache.shape[1:] == (64, 1, 656)
        assert is_fp8_kvcache
        assert not causal
        assert tile_scheduler_metadata == "plan"
        rows = PackedLatents(k_cache.reshape(1, -1, 656)).unpack()[0]
        out, lse = self.attend(q, rows, indices, softmax_scale)
        return out, lse.transpose(1, 2)


class DeepGEMM(ModuleType):
    """`deep_gemm` with its scores; what a query does not see is left as anything."""

    def __init__(self, wrong: float = 1.0) -> None:
        super().__init__("deep_gemm")
        self.wrong = wrong

    def fp8_mqa_logits(
        self, q: Tensor, kv: tuple[Tensor, Tensor], weights: Tensor, ks: Tensor, ke: Tensor, clean_logits: bool = True
    ) -> Tensor:
        assert q.dtype == kv[0].dtype == torch.float8_e4m3fn
        dots = torch.einsum("thd,sd->ths", q.float(), kv[0].float()).relu()
        logits = self.wrong * torch.einsum("ths,th->ts", dots, weights) * kv[1]
        columns = torch.arange(kv[0].shape[0])
        seen = (columns >= ks[:, None]) & (columns < ke[:, None])
        return logits.masked_fill(~seen, 1e30)


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapters believe that they may run; whatever they learned is forgotten afterwards."""
    found = vendor_support.device_gap

    def device_gap(name: str, device: torch.device) -> str | None:
        return None if name in sys.modules else found(name, device)

    monkeypatch.setattr(vendor_support, "device_gap", device_gap)
    vendor_support.forget()
    yield
    vendor_support.forget()


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, module.__name__, module)


def latent(heads: int, batch: int = 2, keys: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(batch, 3, heads, 576, generator=generator).bfloat16()
    rows = torch.randn(batch, keys, 1, 576, generator=generator).bfloat16()
    indices = torch.randint(-1, keys, (batch, 3, 50), generator=generator)
    indices[0, 1] = -1
    return q, rows, indices


@pytest.mark.parametrize("base", [2.0, math.e])
@pytest.mark.parametrize("heads", [5, 64, 128])
@pytest.mark.parametrize("sink", [False, True])
def test_latent_rows(heads: int, sink: bool, base: float, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FlashMLA(prefill_base=base))
    q, rows, indices = latent(heads)
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(1)) if sink else None
    arguments = (q, rows, rows[..., :512], indices)
    found = sparse_attention(*arguments, sink_logits=sinks, impl="vendor")
    expected = sparse_attention(*arguments, sink_logits=sinks, impl="reference")
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[1], expected[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("paged", [False, True])
def test_fp8_rows(paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FlashMLA())
    q, rows, indices = latent(64)
    packed: PackedLatents | PagedLatents = pack_latents(rows.squeeze(2), impl="reference")
    if paged:
        table = torch.tensor([[3, 1, -1], [0, 2, -1]], dtype=torch.int32)
        pages = PagedLatents(torch.zeros(4, 64, 656, dtype=torch.uint8), table, 128)
        pages.write(packed)
        packed = pages
    found = sparse_attention(q, packed, None, indices, impl="vendor")
    expected = sparse_attention(q, packed, None, indices, impl="reference")
    torch.testing.assert_close(found[0], expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[1], expected[1], atol=1e-3, rtol=1e-3)
    # Outside there is nothing to read: skipped, as on every GPU.
    outside = indices.masked_fill(indices == 7, 128 + 7)
    kept = sparse_attention(q, packed, None, indices.masked_fill(indices == 7, -1), impl="vendor")
    assert torch.equal(sparse_attention(q, packed, None, outside, impl="vendor")[0], kept[0])


def test_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FlashMLA())
    q, rows, indices = latent(64)
    out, lse = sparse_attention(q, rows[:, :0], rows[:, :0, :, :512], indices.fill_(-1), impl="vendor")
    assert not out.any()
    assert lse.eq(-torch.inf).all()


def test_what_the_library_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    q, rows, indices = latent(64)
    values = rows[..., :512]
    with pytest.raises(NotImplementedError, match=r"flash_mla needs an NVIDIA GPU.*Use .*reference"):
        sparse_attention(q, rows, values, indices, impl="vendor")
    install(monkeypatch, FlashMLA())
    for change, reason in (
        ({"softcap": 2.0}, "has no softcap"),
        ({"q": q.float()}, "takes bf16 queries"),
        ({"q": q[..., :200], "k": rows[..., :200], "v": rows[..., :100]}, "one KV head of 576 dims"),
        ({"v": values.clone()}, "whose first 512 are the values"),
        ({"q": q.clone().requires_grad_()}, "no backward pass"),
    ):
        arguments: dict[str, Any] = {"q": q, "k": rows, "v": values, "indices": indices} | change
        with pytest.raises(NotImplementedError, match=reason):
            sparse_attention(**arguments, impl="vendor")
    with pytest.raises(NotImplementedError, match="multiple of 64 rows"):
        sparse_attention(q, pack_latents(rows.squeeze(2))[:, :100], None, indices.clamp_max(99), impl="vendor")


@pytest.mark.parametrize("module", [FlashMLA(wrong=1.0), FlashMLA(prefill_base=10.0), ModuleType("flash_mla")])
def test_a_release_that_answers_wrongly_is_not_used(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, module)
    q, rows, indices = latent(64)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="flash_mla does not take this form here: "):
            sparse_attention(q, rows, rows[..., :512], indices, impl="vendor")
    assert getattr(module, "calls", 0) <= 1


class WithoutHopper(FlashMLA):
    """As the release of autumn 2026: kernels for 64 heads and 512 places only, so it seems from outside."""

    def attend(self, q: Tensor, rows: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if q.shape[-2] != 64 or indices.shape[-1] != 512:
            raise RuntimeError("no kernel instance for this form\nwith a second line")
        return super().attend(q, rows, indices, scale)


def test_a_release_without_the_form_is_refused_with_what_would_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, WithoutHopper())
    q, rows, indices = latent(64)
    arguments = (q, rows, rows[..., :512], indices)
    with pytest.raises(NotImplementedError, match=r"no kernel instance for this form\. FlashMLA at commit ba89a346"):
        sparse_attention(*arguments, impl="vendor")
    many = indices.repeat(1, 1, 9)
    assert sparse_attention(q, rows, rows[..., :512], many, impl="vendor")[0].shape == (2, 3, 64, 512)
    # By itself the operation goes on without it.
    expected = sparse_attention(*arguments, impl="reference")
    monkeypatch.setattr("dsa.ops.native_support.gap", lambda *tensors: "not for this test")
    assert torch.equal(sparse_attention(*arguments)[0], expected[0])


def test_a_refusal_in_the_middle_of_a_run_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FlashMLA()
    install(monkeypatch, module)
    monkeypatch.setattr(vendor_support, "_choices", lambda index: Choices(tmp_path / "c.json", lambda launch: 1.0))
    monkeypatch.setattr(vendor_support, "tuning", lambda: True)
    monkeypatch.setattr("dsa.ops.native_support.gap", lambda *tensors: "not for this test")
    q, rows, indices = latent(64)
    whole = module.flash_mla_sparse_fwd

    def only_small(q: Tensor, *rest: Any) -> Any:
        if q.shape[0] > 1:
            raise AssertionError
        return whole(q, *rest)

    monkeypatch.setattr(module, "flash_mla_sparse_fwd", only_small)
    for _ in range(2):
        found = sparse_attention(q, rows, rows[..., :512], indices)
        assert torch.equal(found[0], sparse_attention(q, rows, rows[..., :512], indices, impl="reference")[0])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "not installed"),
        ("assert False, 'Expected one FlashMLA extension, found []'", "cannot be imported: Expected one FlashMLA"),
        ("import torch_of_another_maker", "cannot be imported: No module named 'torch_of_another_maker'"),
        ("raise OSError('undefined symbol')", "cannot be imported: undefined symbol"),
        ("__version__ = '1.0.0'\ndef get_mla_metadata(): pass", "1.0.0, without flash_mla_sparse_fwd, flash_mla_with"),
    ],
)
def test_info_says_what_is_installed_and_what_would_serve(
    source: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "flash_mla.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_mla", raising=False)
    vendor_support.forget()
    found = vendor_support.found("flash_mla")
    assert said in found
    assert "commit ba89a346" in found
    sys.modules.pop("flash_mla", None)


def test_a_release_that_serves_is_named_with_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FlashMLA())

    class Distribution:
        def read_text(self, name: str) -> str:
            return '{"vcs_info": {"commit_id": "ba89a3466e9470ad"}}'

    with monkeypatch.context() as patched:
        patched.setattr(vendor_support, "installed", lambda name: True)
        patched.setattr(vendor_support, "version", lambda name: "1.0.0")
        patched.setattr("importlib.metadata.distribution", lambda name: Distribution())
        assert vendor_support.found("flash_mla") == "1.0.0 at commit ba89a346"


@pytest.mark.parametrize(("vendor_ms", "chosen"), [(1.0, "vendor"), (9.0, "reference")])
def test_auto_takes_what_was_measured_to_be_faster(
    vendor_ms: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FlashMLA()
    install(monkeypatch, module)
    measured = []

    def time(launch: Any) -> float:
        before = module.calls
        launch()
        measured.append(module.calls > before)
        return vendor_ms if measured[-1] else 5.0

    monkeypatch.setattr(vendor_support, "_choices", lambda index: Choices(tmp_path / "choices.json", time))
    monkeypatch.setattr(vendor_support, "tuning", lambda: True)
    monkeypatch.setattr("dsa.ops.native_support.gap", lambda *tensors: "not for this test")
    q, rows, indices = latent(64)
    for _ in range(2):
        before = module.calls
        sparse_attention(q, rows, rows[..., :512], indices)
    assert (module.calls > before) == (chosen == "vendor")
    # Once each, and the second call reads what the first wrote.
    assert sorted(measured) == [False, True]


def index_inputs(heads: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(2, 5, heads, 32, generator=generator),
        torch.randn(2, 90, 32, generator=generator),
        torch.randn(2, 5, heads, generator=generator),
    )


def test_index_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection of the library's scores is that of keys and queries in e4m3."""
    install(monkeypatch, DeepGEMM())
    q, k, w = index_inputs()
    keys = quantize_index_keys(k, "fp8")
    end = torch.tensor([[90, 80, 5, 0, 33], [20, 90, 90, 90, 90]])
    options: dict[str, Any] = {
        "sinks": 2,
        "local": 3,
        "key_end": end,
        "key_start": torch.full_like(end, 4).clamp(max=end),
    }
    found = index_topk(q, keys, w, 9, impl="vendor", **options)
    rounded = quantize_index_keys(q.flatten(1, 2), "fp8").dequantize().view_as(q)
    expected = index_topk(rounded, keys.dequantize(), w, 9, impl="reference", **options)
    assert torch.equal(found, expected)


def test_index_keys_that_the_library_does_not_score(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, w = index_inputs()
    with pytest.raises(NotImplementedError, match="deep_gemm needs an NVIDIA GPU"):
        index_topk(q, quantize_index_keys(k, "fp8"), w, 9, impl="vendor")
    install(monkeypatch, DeepGEMM())
    with pytest.raises(NotImplementedError, match="scores fp8 keys"):
        index_topk(q, quantize_index_keys(k), w, 9, impl="vendor")
    with pytest.raises(NotImplementedError, match="32 or 64 index heads"):
        index_topk(q[:, :, :3], quantize_index_keys(k, "fp8"), w[..., :3], 9, impl="vendor")
    vendor_support.forget()
    install(monkeypatch, DeepGEMM(wrong=1.5))
    with pytest.raises(NotImplementedError, match="other scores than the indexer's"):
        index_topk(q, quantize_index_keys(k, "fp8"), w, 9, impl="vendor")


def test_libraries_are_looked_for_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not vendor_support.installed("no_such_library_of_anybody")
    monkeypatch.undo()
    assert vendor_support.device_gap("flash_mla", CPU) == "flash_mla needs an NVIDIA GPU, and the tensors are on cpu"
    with monkeypatch.context() as patched:
        patched.setattr(vendor_support, "capability", lambda index: (8, 6))
        patched.setattr(vendor_support, "installed", lambda name: name == "there")
        assert vendor_support.device_gap("absent", torch.device("cuda")) == "absent is not installed"
        assert "the GPU has 8.6" in str(vendor_support.device_gap("there", torch.device("cuda")))
