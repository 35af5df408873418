"""`index_topk` in Triton: the shared cases at small sizes, and rounds, groups and chunks that only large sizes have."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa.ops import PagedKeys, QuantizedKeys, index_topk, quantize_index_keys
from dsa.ops.index_topk import reference
from dsa.ops.index_topk import triton as kernels
from dsa.ops.quantize import hadamard_transform, is_power_of_two
from dsa.ops.ranges import VisibleRanges, resolve_ranges
from dsa.testing import oracles
from dsa.testing.cases import CASES, Case, Inputs, make_inputs

ATTENTION_ONLY = {
    "multi_query", "multi_head", "narrow_values", "wide_values", "bf16_keys", "fp16_keys", "softcap", "sink_logits",
    "softcap_and_sink_logits",
}  # fmt: skip
# The interpreter takes about 30 ms for each token.
SMALL = [
    replace(case, tokens=min(case.tokens, 4), keys=min(case.keys, 37))
    for case in CASES
    if case.dtype != torch.float64 and case.name not in ATTENTION_ONLY
]
BY_NAME = {case.name: case for case in SMALL}

# The interpreter computes with NumPy, which warns of what the cases with NaN and infinity are there for.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

ROUNDS = kernels.Limits(rows=64, first_round=256, one_round=1, candidates=1, block=512, segments=3)


def run(case: Case, inputs: Inputs, keys: Tensor | QuantizedKeys, impl: str = "triton") -> Tensor:
    return index_topk(
        inputs.q_index,
        keys,
        inputs.w_index,
        case.top_k,
        sinks=case.sinks,
        local=case.local,
        key_start=inputs.key_start,
        key_end=inputs.key_end,
        impl=impl,
    )


def visible(case: Case, inputs: Inputs) -> oracles.Positions:
    return oracles.visible_positions(inputs.key_start, inputs.key_end, case.batch, case.tokens, case.keys)


def both(
    q: Tensor, k: Tensor | QuantizedKeys, w: Tensor, top_k: int, limits: kernels.Limits, sinks: int = 0, local: int = 0,
    ranges: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernels select within these limits, and what the reference selects."""
    resolved = resolve_ranges("index_topk", *ranges, q.shape[0], q.shape[1], k.shape[1], q.device)
    options = {"scale": q.shape[-1] ** -0.5, "sinks": sinks, "local": local, "ranges": resolved}
    return (
        kernels.select(q, k, w, top_k, limits=limits, **options),
        reference.index_topk(q, k, w, top_k, **options),
    )


def make_index(
    batch: int, tokens: int, keys: int, device: str, heads: int = 2, dim: int = 16, tied: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + 3 * tokens + keys)
    sizes = (batch, tokens, heads, dim), (batch, keys, dim), (batch, tokens, heads)
    if tied:
        return tuple(torch.randint(-1, 2, size, generator=generator).float().to(device) for size in sizes)
    return tuple(torch.randn(size, generator=generator).to(device) for size in sizes)


def in_pages(keys: QuantizedKeys, block: int) -> PagedKeys:
    """The keys in pages that lie in another order; unused entries of the table are -1."""
    batch, tokens, dim = keys.shape
    used = -(-tokens // block)
    order = torch.randperm(batch * used, generator=torch.Generator().manual_seed(3)).int().view(batch, used)
    table = torch.cat((order, torch.full((batch, 2), -1, dtype=torch.int32)), dim=1).to(keys.device)
    pages = torch.full((batch * used, block, dim + 4), 255, dtype=torch.uint8, device=keys.device)
    paged = PagedKeys(pages, table, tokens, keys.dtype)
    paged.write(keys)
    return paged


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_int8_selection_is_that_of_the_reference(case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    keys = quantize_index_keys(inputs.k_index, impl="reference")
    assert torch.equal(run(case, inputs, keys), run(case, inputs, keys, "reference"))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_selects_the_highest_scores(case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    selection = run(case, inputs, inputs.k_index).cpu()
    scores = oracles.index_scores(*(x.double().cpu() for x in (inputs.q_index, inputs.k_index, inputs.w_index)))
    seen = visible(case, inputs)
    if case.content == "random":
        tolerance = 1e-5 * (scores.abs().amax().item() if scores.numel() else 0.0)
        oracles.assert_selection_optimal(selection, scores, seen, case.top_k, case.sinks, case.local, tolerance)
    else:
        assert torch.equal(selection, oracles.select(scores, seen, case.top_k, case.sinks, case.local))


@pytest.mark.parametrize("name", ["odd_lengths", "index_dim_24", "left_padding", "sinks_and_local", "not_finite"])
def test_fp8_selection_is_that_of_keys_and_queries_in_e4m3(name: str, device: str) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case, device)
    keys = quantize_index_keys(inputs.k_index, "fp8")
    rows = quantize_index_keys(inputs.q_index.flatten(1, 2), "fp8").dequantize().view_as(inputs.q_index)
    scores = oracles.index_scores(*(x.double().cpu() for x in (rows, keys.dequantize(), inputs.w_index)))
    selection = run(case, inputs, keys).cpu()
    seen = visible(case, inputs)
    if case.content == "poisoned":
        assert torch.equal(selection, oracles.select(scores, seen, case.top_k, case.sinks, case.local))
    else:
        oracles.assert_selection_optimal(selection, scores, seen, case.top_k, case.sinks, case.local, 1e-4)


def test_e4m3_queries_lose_little(device: str) -> None:
    case = replace(BY_NAME["odd_lengths"], index_heads=8, index_dim=64, keys=200, top_k=40)
    inputs = make_inputs(case, device)
    selection = run(case, inputs, quantize_index_keys(inputs.k_index, "fp8"))
    query = hadamard_transform(inputs.q_index) if is_power_of_two(case.index_dim) else inputs.q_index
    exact = oracles.index_scores(*(x.double() for x in (query, hadamard_transform(inputs.k_index), inputs.w_index)))
    best = oracles.select(exact.cpu(), visible(case, inputs), case.top_k, 0, 0)
    common = (selection.cpu().unsqueeze(-1) == best.unsqueeze(-2)).any(-1).double().mean()
    assert common > 0.9


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize(("sinks", "local"), [(0, 0), (3, 5)])
def test_rounds(tied: bool, sinks: int, local: int, device: str) -> None:
    q, k, w = make_index(2, 3, 1100, device, heads=1 if tied else 2, tied=tied)
    selection, expected = both(q, quantize_index_keys(k), w, 37, ROUNDS, sinks, local)
    assert torch.equal(selection, expected)


def test_rounds_in_which_everything_beats_what_came_before(device: str) -> None:
    # The oldest token has the highest score, so every round passes whole and fills its segments to the brim.
    q, w = torch.ones(1, 2, 1, 16, device=device), torch.ones(1, 2, 1, device=device)
    k = torch.arange(1100, 0, -1, device=device, dtype=torch.float32)[None, :, None].expand(-1, -1, 16)
    selection, expected = both(q, k, w, 37, ROUNDS)
    assert torch.equal(selection, expected)
    assert selection[0, 1].tolist() == list(range(37))


def test_rounds_with_ranges_of_every_length(device: str) -> None:
    end = torch.tensor([[1100, 40, 900, 1099, 0, 600, 37, 38]], dtype=torch.int32, device=device)
    start = torch.tensor([[0, 10, 700, 1000, 0, 300, 0, 0]], dtype=torch.int32, device=device)
    q, k, w = make_index(1, 8, 1100, device)
    selection, expected = both(q, quantize_index_keys(k), w, 37, ROUNDS, 3, 4, (start, end))
    assert torch.equal(selection, expected)


def test_a_plan_for_more_keys_than_are_visible(device: str) -> None:
    # What a graph captures: the host does not know the ranges and plans for all keys.
    end = torch.tensor([[700, 40, 0, 38]], device=device)
    start = torch.tensor([[300, 0, 0, 0]], device=device)
    q, k, w = make_index(1, 4, 1100, device)
    keys = quantize_index_keys(k)
    _, expected = both(q, keys, w, 37, ROUNDS, ranges=(start, end))
    ranges = VisibleRanges(start, end, torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 1100))
    for limits in (ROUNDS, kernels.Limits()):
        selection = kernels.select(q, keys, w, 37, scale=0.25, sinks=0, local=0, ranges=ranges, limits=limits)
        assert torch.equal(selection, expected)


def test_more_candidates_than_a_block(device: str) -> None:
    q, k, w = make_index(1, 2, 600, device, heads=1, tied=True)
    limits = replace(ROUNDS, block=64)
    selection, expected = both(q, quantize_index_keys(k), w, 90, limits)
    assert torch.equal(selection, expected)


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
def test_groups_are_merged(tied: bool, device: str) -> None:
    q, k, w = make_index(2, 1, 1500, device, tied=tied)
    selection, expected = both(q, quantize_index_keys(k), w, 37, kernels.Limits(block=256), sinks=2, local=3)
    assert torch.equal(selection, expected)


def test_chunks_of_queries(device: str) -> None:
    q, k, w = make_index(3, 7, 60, device)
    for rows in (1, 4):
        selection, expected = both(q, quantize_index_keys(k), w, 20, kernels.Limits(rows=rows))
        assert torch.equal(selection, expected)


def test_several_blocks_of_queries_and_one_token_at_a_time(device: str) -> None:
    q, k, w = make_index(1, 21, 150, device, heads=1)
    keys = quantize_index_keys(k)
    whole = index_topk(q, keys, w, 9, sinks=1, local=2, impl="triton")
    assert torch.equal(whole, index_topk(q, keys, w, 9, sinks=1, local=2, impl="reference"))
    for t in (0, 7, 20):
        one = index_topk(q[:, t : t + 1], keys[:, : 130 + t], w[:, t : t + 1], 9, sinks=1, local=2, impl="triton")
        assert torch.equal(one, whole[:, t : t + 1])


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_keys_are_read_where_the_cache_holds_them(dtype: str, device: str) -> None:
    q, k, w = make_index(2, 2, 50, device)
    room = torch.full((2, 80, 16), torch.nan, device=device)
    room[:, 20:70] = k
    cache = quantize_index_keys(room, dtype)
    selection = index_topk(q, cache[:, 20:70], w, 9, impl="triton")
    assert torch.equal(selection, index_topk(q, quantize_index_keys(k, dtype), w, 9, impl="triton"))


@pytest.mark.parametrize(
    ("dtype", "limits"), [("fp8", kernels.Limits()), ("int8", replace(ROUNDS, rows=2))], ids=["one round", "rounds"]
)
def test_keys_are_read_in_their_pages(dtype: str, limits: kernels.Limits, device: str) -> None:
    """Prefill in one round and in several, chunks that split the batch, packed documents."""
    q, k, w = make_index(3, 2, 400, device)
    keys = quantize_index_keys(k, dtype)
    start = torch.tensor([[0, 60]], device=device).expand(3, 2)
    end = torch.tensor([[290, 400]], device=device).expand(3, 2)
    ranges = resolve_ranges("index_topk", start, end, 3, 2, 400, q.device)
    options = {"scale": 0.25, "sinks": 2, "local": 3, "ranges": ranges, "limits": limits}
    selection = kernels.select(q, in_pages(keys, 64), w, 37, **options)
    assert torch.equal(selection, kernels.select(q, keys, w, 37, **options))


@pytest.mark.parametrize("tokens", [5, 1500])
def test_decoding_reads_pages_too(tokens: int, device: str) -> None:
    q, k, w = make_index(2, 1, tokens, device)
    keys = quantize_index_keys(k)
    paged = in_pages(keys, 16)
    selection = index_topk(q, paged, w, 9, impl="triton")
    assert torch.equal(selection, index_topk(q, keys, w, 9, impl="reference"))


def test_a_page_outside_the_pool_is_not_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, w = make_index(1, 1, 40, device)
    keys = quantize_index_keys(k)
    paged = in_pages(keys, 8)
    paged.block_table[0, 1], paged.block_table[0, 3] = 5, -3
    keys.data[0, 8:16], keys.data[0, 24:32] = 0, 0
    selection = index_topk(q, paged, w, 9, impl="triton")
    assert torch.equal(selection, index_topk(q, keys, w, 9, impl="reference"))
    monkeypatch.setenv("DSA_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match="block_table entries"):
        index_topk(q, paged, w, 9, impl="triton")


@pytest.mark.parametrize(("q_dtype", "k_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_mixed_dtypes(q_dtype: torch.dtype, k_dtype: torch.dtype, device: str) -> None:
    q, k, w = make_index(1, 2, 50, device)
    q, k = q.to(q_dtype), k.to(k_dtype)
    selection = index_topk(q, k, w, 9, impl="triton").cpu()
    scores = oracles.index_scores(*(x.double().cpu() for x in (q, k, w)))
    seen = oracles.visible_positions(None, None, 1, 2, 50)
    oracles.assert_selection_optimal(selection, scores, seen, 9, 0, 0, 1e-5)


@pytest.mark.parametrize("dtype", ["int8", None])
def test_is_one_operator(dtype: str | None, device: str) -> None:
    q, k, w = make_index(1, 2, 20, device, heads=1)
    key, key_scale = (k, None)
    if dtype is not None:
        quantised = quantize_index_keys(k, dtype)
        key, key_scale = quantised.data, quantised.scale
    end = torch.tensor([[20, 12]], dtype=torch.int32, device=device)
    torch.library.opcheck(kernels._index_topk, (q, key, key_scale, None, w, None, end, 20, "", 3, 0.25, 1, 1))
    if dtype is not None:
        paged = in_pages(QuantizedKeys(key, key_scale), 8)
        arguments = (q, paged.pages, None, paged.block_table, w, None, end, 20, dtype, 3, 0.25, 1, 1)
        torch.library.opcheck(kernels._index_topk, arguments)


def test_compiles_into_one_graph(device: str) -> None:
    q, k, w = make_index(1, 2, 20, device, heads=1)
    compiled = torch.compile(
        lambda q, k, w: index_topk(q, k, w, 3, sinks=1, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, w), compiled.__wrapped__(q, k, w))


def test_a_wrong_range_is_refused(device: str) -> None:
    q, k, w = make_index(1, 2, 20, device, heads=1)
    with pytest.raises(ValueError, match=r"key_end must lie in \[0, S\] = \[0, 20\]"):
        index_topk(q, k, w, 3, key_end=torch.tensor([[20, 21]], device=device), impl="triton")


def test_what_the_kernels_lack_is_said(device: str) -> None:
    q, k, w = make_index(1, 2, 5, device, dim=300)
    with pytest.raises(NotImplementedError, match=r"at most 256 dims, got 300.*Use .*reference"):
        index_topk(q, k, w, 2, impl="triton")
    with pytest.raises(NotImplementedError, match="fp64"):
        index_topk(q.double(), k.double(), w.double(), 2, impl="triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsa.ops.index_topk import triton_kernels as kernels
from dsa.ops.quantize import triton as quantize

# Of tuples of strides, those that are constants.
ones = {"q_strides": (None, None, None, 1), "k_strides": (None, None, 1), "scale_strides": (None, 1),
        "table_strides": (None, None), "start_strides": (None, None), "end_strides": (None, None)}
of_rows = {"x_strides": (None,) * 4, "weight_strides": (None,) * 3, "data_strides": (None,) * 4,
           "scale_strides": (None,) * 3}

def check(kernel, capability, pointers, tuples=ones, **constants):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    for name in signature.keys() & tuples.keys():
        signature[name] = tuple("i32" if value is None else "constexpr" for value in tuples[name])
        constants |= {(kernel.arg_names.index(name), place): value
                      for place, value in enumerate(tuples[name]) if value is not None}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": 4})
    assert compiled.asm["cubin"]

int32 = dict.fromkeys(("first_ptr", "last_ptr", "bound_ptr", "dense_ptr", "count_ptr", "count_in_ptr",
                       "count_out_ptr", "selection_ptr", "table_ptr"), "*i32")
tile = dict(HEADS=4, DIM=128, BLOCK_D=128, BLOCK_N=64, STAGES=3)
kinds = (80, "int8", "i8"), (80, "fp8_as_fp16", "u8"), (90, "fp8", "fp8e4nv"), (90, "half", "bf16")
for capability, kind, element in kinds:
    pointers = int32 | {"q_ptr": "*" + element, "k_ptr": "*" + element, "coefficient_ptr": "*fp32",
                        "key_scale_ptr": "*fp32", "candidate_ptr": "*i64"}
    for rows, filtered in (16, False), (64, True):
        check(kernels.score_kernel, capability, pointers, **tile, BLOCK_M=rows, KIND=kind, SCALED=kind != "half",
              PAGE=0 if filtered or kind == "half" else 64, FILTER=filtered)
for dense, final in (True, False), (False, True):
    pointers = int32 | {"source_ptr": "*i32" if dense else "*i64", "target_ptr": "*i64"}
    check(kernels.select_kernel, 80, pointers, DENSE=dense, FINAL=final, BLOCK=1024, BLOCK_M=64)
check(kernels.fill_kernel, 80, {"start_ptr": "*i64", "end_ptr": "*i64", "selection_ptr": "*i32"}, BLOCK=64)
for fp8 in False, True:
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "data_ptr": "*u8" if fp8 else "*i8", "scale_ptr": "*fp32",
                "coefficient_ptr": "*fp32", "normalizer": "fp32", "levels": "fp32", "factor": "fp32"}
    check(quantize._quantize_kernel, 80, pointers, of_rows, DIM=128, BLOCK_D=128, BLOCK_ROWS=32, ROTATE=True, FP8=fp8,
          POWER_OF_TWO=fp8, WEIGHTED=fp8)
"""


def test_kernels_compile_for_ampere_and_hopper(tmp_path: object) -> None:
    # The compiler checks types that the interpreter does not. It needs no GPU, but a process without the interpreter.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=300)
