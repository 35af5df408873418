"""Single operations compared with their peers: the index, the training signal, the quantisation of keys.

Shapes: `S` keys, `T` queries, `Hi`/`Di` index heads / index head dim, `K` top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsa.bench import agreement
from dsa.bench.measure import Disagreement, in_turn, ratio
from dsa.bench.prefill import QUICK_TOP_K, layer_tensors
from dsa.bench.result import Row
from dsa.bench.settings import Settings
from dsa.bench.tensors import DEFAULT_MODEL_SIZES, LayerTensors, Sizes, gaussian
from dsa.models.default_model import Status
from dsa.ops import QuantizedKeys, hadamard_transform, index_topk, indexer_loss, quantize_index_keys
from dsa.runs.progress import Progress

INDEX_LENGTHS = (32768,)
INDEX_QUERIES = 2048
TORCH_CHUNK = 256
INDEX_ROUNDS = 3
"""At least, whatever the budget: `index_topk` takes a tenth of a second, and one run of it says little."""

LOSS_TOKENS = 4096
QUANTIZE_TOKENS = 32768


def index(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """`index_topk` for the last queries of a text, compared with torch and with transformers' own indexer."""
    queries = 32 if settings.quick else INDEX_QUERIES
    for length in settings.lengths_or(INDEX_LENGTHS, (160,)):
        for data in settings.data:
            source = layer_tensors(data, length, settings, progress, status)
            sizes = replace(source.sizes, sinks=0, local=0)
            tensors = last_queries(source.tensors.prefix(length), min(queries, length))
            with progress(f"index_topk over {length:,}, {data}", 1) as advance:
                row = _index_at(tensors, sizes, settings)
                advance()
            row.case = f"n = {length:,}, {data}"
            row.length = length
            row.notes.insert(0, f"Tensors: {source.source}.")
            yield row


def last_queries(tensors: LayerTensors, queries: int) -> LayerTensors:
    """The same keys, and the last of the queries."""
    return replace(
        tensors,
        query=tensors.query[:, -queries:],
        index_query=tensors.index_query[:, -queries:],
        index_weight=tensors.index_weight[:, -queries:],
    )


def _index_at(tensors: LayerTensors, sizes: Sizes, settings: Settings) -> Row:
    queries, keys = tensors.index_query.shape[1], tensors.index_key.shape[1]
    # The peers compute in fp32; the rotation that int8 keys carry is applied to their queries once, untimed.
    query = hadamard_transform(tensors.index_query)
    assert isinstance(tensors.index_key, QuantizedKeys)
    key = tensors.index_key.dequantize()
    selected: dict[str, Tensor] = {}

    def own() -> None:
        selected["index_topk"] = index_topk(tensors.index_query, tensors.index_key, tensors.index_weight, sizes.top_k)

    def plain() -> None:
        selected["torch"] = select_in_torch(query, key, tensors.index_weight, sizes.top_k)

    contenders: dict[str, Callable[[], None]] = {"torch": plain, "index_topk": own}
    transformers_indexer = indexer_of_transformers(query, key, tensors.index_weight, sizes.top_k)

    def eager() -> None:
        selected["deepseek_v32"] = transformers_indexer()

    contenders["deepseek_v32"] = eager
    # A budget too short for a round of warm-up would count loading the kernels and touching memory for the first time.
    for run in contenders.values():
        run()
    timings = in_turn(contenders, budget=settings.budget, least=1 if settings.quick else INDEX_ROUNDS)
    rows = agreement.spread_rows(0, queries)
    expected, said = agreement.check_selection(tensors, sizes, rows)
    if not torch.equal(selected["index_topk"][:, rows], expected):
        raise Disagreement("index_topk selects other tokens for all queries at once than for a few of them")
    checks = [said]
    wide = replace(tensors, index_query=query, index_key=key)
    in_fp32 = agreement.reference_selection(wide, sizes, rows)
    for name in ("torch", "deepseek_v32"):
        checks.append(check_scores(name, selected[name][0, rows], in_fp32[0], wide, rows))
    row = Row("index", "", {"queries": queries, "keys": keys, **sizes.describe()}, timings, checks=checks)
    row.figures = [
        ratio("torch / index_topk", timings["torch"], timings["index_topk"]),
        ratio("deepseek_v32 / index_topk", timings["deepseek_v32"], timings["index_topk"]),
    ]
    row.notes = [
        f"torch: einsum, ReLU, weights and topk over chunks of {TORCH_CHUNK} queries, fp32. deepseek_v32: the eager "
        "indexer of transformers on the same queries, keys and weights, fp32, all queries at once.",
    ]
    return row


def select_in_torch(query: Tensor, key: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """`[1, T, K]`: what a user would write, a few queries at a time, right-aligned causal."""
    tokens, keys = query.shape[1], key.shape[1]
    positions = torch.arange(keys)
    chunks = []
    for begin in range(0, tokens, TORCH_CHUNK):
        stop = min(begin + TORCH_CHUNK, tokens)
        dots = torch.einsum("thd,sd->ths", query[0, begin:stop], key[0]).relu_()
        scores = torch.einsum("ths,th->ts", dots, weight[0, begin:stop])
        last = keys - tokens + torch.arange(begin, stop)
        scores.masked_fill_(positions > last[:, None], float("-inf"))
        chunks.append(scores.topk(min(top_k, keys), dim=-1).indices)
    return torch.cat(chunks)[None]


def indexer_of_transformers(query: Tensor, key: Tensor, weight: Tensor, top_k: int) -> Callable[[], Tensor]:
    """transformers' eager indexer of DeepSeek-V3.2 on given queries, keys and weights.

    Its projections become identities, its RoPE turns by nothing, and its cache answers with the given keys.
    """
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

    _, tokens, heads, dim = query.shape
    keys = key.shape[1]
    rotated = dim // 2
    config = DeepseekV32Config(
        hidden_size=heads,
        q_lora_rank=heads * dim,
        index_n_heads=heads,
        index_head_dim=dim,
        index_topk=top_k,
        qk_rope_head_dim=rotated,
    )
    module = DeepseekV32Indexer(config, 0).eval()
    with torch.no_grad():
        module.wq_b.weight.copy_(torch.eye(heads * dim))
        module.weights_proj.weight.copy_(torch.eye(heads) * heads**0.5)

    class Keys:
        def update_indexer(self, new: Tensor, layer: int) -> Tensor:
            return key

    angles = torch.ones(1, tokens, rotated), torch.zeros(1, tokens, rotated)
    mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)[None]
    flat = query.reshape(1, tokens, heads * dim)
    return lambda: module(weight, flat, angles, mask, None, Keys())


def check_scores(name: str, selected: Tensor, expected: Tensor, tensors: LayerTensors, rows: Tensor) -> str:
    """Compares the scores of what a peer selected with those of what the reference did.

    Positions may differ: with few heads many scores are exactly zero, and peers choose among equals as they like.

    Args:
        name: The peer's.
        selected: int `[R, K]`.
        expected: int `[R, K]`.
        tensors: With fp32 keys.
        rows: The `R` queries.

    Raises:
        Disagreement: The peer selected worse tokens.
    """
    assert isinstance(tensors.index_key, Tensor)
    worst = []
    for row, theirs, ours in zip(rows.tolist(), selected.long(), expected.long(), strict=True):
        visible = tensors.index_key.shape[1] - tensors.index_query.shape[1] + row + 1
        keys = tensors.index_key[0, :visible].double()
        dots = torch.einsum("hd,sd->hs", tensors.index_query[0, row].double(), keys).relu()
        scores = tensors.index_weight[0, row].double() @ dots
        wanted = ours[ours >= 0]
        found = theirs[theirs < visible][: len(wanted)].clamp_min(0)
        worst.append((scores[found].sort().values - scores[wanted].sort().values).abs().max() / scores.abs().max())
    error = float(torch.stack(worst).max())
    if not error <= agreement.LARGEST_ERROR:
        raise Disagreement(f"{name} selects tokens whose scores differ by {error:.2g} from what the reference selects")
    return f"scores that {name} selects within {error:.1g}"


def loss(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """`indexer_loss`, forward and backward, over all visible tokens and over the selected ones."""
    (tokens,) = settings.lengths_or((LOSS_TOKENS,), (96,))[-1:]
    sizes = replace(DEFAULT_MODEL_SIZES, top_k=QUICK_TOP_K, local=8) if settings.quick else DEFAULT_MODEL_SIZES
    tensors = gaussian(sizes, tokens)
    indices = index_topk(tensors.index_query, tensors.index_key, tensors.index_weight, sizes.top_k)
    for form, chosen in (("all visible tokens", None), ("selected tokens", indices)):
        with progress(f"indexer_loss, {form}", 1) as advance:
            row = _loss_of(form, chosen, tensors, sizes, settings)
            advance()
        row.length = tokens
        yield row


def _loss_of(form: str, indices: Tensor | None, tensors: LayerTensors, sizes: Sizes, settings: Settings) -> Row:
    assert isinstance(tensors.index_key, QuantizedKeys)
    keys = tensors.index_key.dequantize()
    made: dict[str, list[Tensor]] = {}

    def run(name: str, impl: str) -> None:
        inputs = [part.clone().requires_grad_() for part in (tensors.index_query, keys, tensors.index_weight)]
        query, key, weight = inputs
        value = indexer_loss(
            query,
            key,
            weight,
            tensors.query,
            tensors.key,
            indices=indices,
            sinks=sizes.sinks if indices is None else 0,
            local=sizes.local if indices is None else 0,
            impl=impl,  # type: ignore[arg-type]
        )
        value.backward()
        made[name] = [value.detach(), *(part.grad for part in inputs if part.grad is not None)]

    timings = in_turn(
        {"reference": lambda: run("reference", "reference"), "auto": lambda: run("auto", "auto")},
        budget=settings.budget,
    )
    names = ("loss", "gradient of the queries", "gradient of the keys", "gradient of the weights")
    checks = [
        agreement.check_close(name, actual, exact)
        for name, actual, exact in zip(names, made["auto"], made["reference"], strict=True)
    ]
    tokens = tensors.query.shape[1]
    row = Row("loss", f"n = {tokens:,}, {form}", {"tokens": tokens, **sizes.describe()}, timings, checks=checks)
    row.figures = [ratio("reference / auto", timings["reference"], timings["auto"])]
    row.notes = ["Forward and backward."]
    return row


def quantize(settings: Settings, progress: Progress, status: Status) -> Iterator[Row]:
    """`quantize_index_keys` to int8, which every token of a prompt passes once."""
    (tokens,) = settings.lengths_or((QUANTIZE_TOKENS,), (160,))[-1:]
    dim = DEFAULT_MODEL_SIZES.index_dim
    keys = torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(0))
    expected, actual = quantize_index_keys(keys, impl="reference"), quantize_index_keys(keys)
    if not torch.equal(expected.data, actual.data) or not torch.equal(expected.scale, actual.scale):
        raise Disagreement("quantize_index_keys writes other bytes than the reference")
    with progress("quantize_index_keys", 1) as advance:
        timings = in_turn(
            {
                "reference": lambda: quantize_index_keys(keys, impl="reference"),
                "auto": lambda: quantize_index_keys(keys),
            },
            budget=min(settings.budget, 10.0),
        )
        advance()
    row = Row("quantize", f"n = {tokens:,}", {"tokens": tokens, "index_dim": dim, "dtype": "int8"}, timings)
    row.length = tokens
    row.figures = [ratio("reference / auto", timings["reference"], timings["auto"])]
    row.checks = ["all bytes equal"]
    yield row
