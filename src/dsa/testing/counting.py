"""Counts what a forward computes and moves while it happens, to hold predicted costs against.

Every operation that torch dispatches passes by. Multiply-adds are taken from the shapes of matrix products, bytes from
the tensors that lie in the storage of a parameter or of a cache: all of a view that is read whole, the rows alone
where rows are gathered. What belongs to which part of the model is known from hooks on its modules and from the
operations' names. Nothing is taken from formulas about models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from dsa import ops
from dsa.cost import PARTS, Work
from dsa.models import attention, layer
from dsa.models.acceleration import is_accelerated
from dsa.models.decoder import decoder_layers, decoder_of
from dsa.models.families import attention_name
from dsa.modules import cache as caches
from dsa.modules.latents import LatentLayer

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
"""Matrix products, and which of their arguments are multiplied."""

GATHERS = (aten.index_select.default, aten.gather.default, aten.embedding.default, aten.index.Tensor)
COPIES = (aten.copy_.default,)

_VIEWS = ("view", "reshape", "transpose", "permute", "slice", "select", "expand", "squeeze", "t", "alias", "detach")


class Counter(TorchDispatchMode):
    """Adds up `Work` by part while it is active.

    Args:
        model: The model whose parameters are weights.
        cache: The cache whose storage is read and written.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache) -> None:
        super().__init__()
        self.parts = {part: Work() for part in PARTS}
        self.region: list[str] = []
        self.elsewhere = Work()
        """What happened outside every part: nothing, if the parts are all there is."""
        self._cache = cache
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name.split("::")[1] not in _VIEWS:
            self._count(func, args, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        stored = self._stored()
        multiply_adds = comparisons = weights = read = written = 0
        if func in PRODUCTS:
            left, right = (args[number] for number in PRODUCTS[func])
            multiply_adds = left.numel() * right.shape[-1]
            weights = sum(_bytes(each) for each in (left, right) if _place(each) in self._weights)
        elif self._part() == "index_scan" and func is aten.mul_.Tensor:
            # The weighted sum over index heads and the keys' scales; the additions go with the products.
            multiply_adds = tensors[0].numel()
        elif self._part() == "index_scan" and func is aten.topk.default:
            comparisons = tensors[0].numel()
        if func in COPIES:
            written = _bytes(tensors[0]) if _place(tensors[0]) in stored else 0
            tensors = tensors[1:]
        for each in tensors:
            if _place(each) in stored:
                read += _bytes(result if func in GATHERS else each)
        self._add(Work(multiply_adds, 0.0, weights, read, written))
        if comparisons:
            self.parts["selection"] += Work(comparisons=comparisons)

    def _part(self) -> str | None:
        return self.region[-1] if self.region else None

    def _add(self, work: Work) -> None:
        if work == Work():
            return
        part = self._part()
        if part is None:
            self.elsewhere += work
        else:
            self.parts[part] += work

    def _stored(self) -> set[int]:
        """Where the cache keeps things, now: storage moves when it grows."""
        buffers = (buffer for each in self._cache.layers for buffer in getattr(each, "_buffers", {}).values())
        return {buffer.storage.untyped_storage().data_ptr() for buffer in buffers if buffer.storage is not None}

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What happens inside belongs to a part."""
        self.region.append(part)
        try:
            yield
        finally:
            self.region.pop()

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, in a part."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return run


def count_decoding(model: PreTrainedModel, tokens: torch.Tensor) -> Counter:
    """Feeds tokens one at a time into a reserved cache, in reference implementations, and counts.

    A token that comes alone sees exactly the tokens before it, so that dense attention computes no pair that a mask
    throws away.

    Args:
        model: Attached or accelerated, in evaluation mode.
        tokens: `[1, n]`.
    """
    cache = DynamicCache(config=decoder_of(model).config)
    caches.reserve(cache, tokens.shape[1])
    counter = Counter(model, cache)
    with ExitStack() as stack:
        for handle in _hooks(model, counter):
            stack.callback(handle.remove)
        for patch in _reference_only(counter):
            stack.enter_context(patch)
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        for number in range(tokens.shape[1]):
            model(tokens[:, number : number + 1], past_key_values=cache, use_cache=True)
    return counter


def _hooks(model: PreTrainedModel, counter: Counter) -> Iterator[Any]:
    """Marks the regions of modules: in a decoder layer all that is not attention is the feed-forward block."""
    for block, own in _blocks(model):
        for name, child in block.named_children():
            yield from _region(child, "attention_projections" if name == own else "feed_forward", counter)
        for name, child in getattr(block, own).named_modules():
            if ".indexer." in f".{name}":
                yield from _region(child, "indexer_projections", counter)
    head = model.get_output_embeddings()
    assert head is not None
    yield from _region(head, "lm_head", counter)


def _blocks(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """The decoder's layers, each with the name of its attention."""
    if is_accelerated(model):
        yield from ((block, "self_attn") for block in decoder_layers(model))
    else:
        yield from ((block, str(attention_name(block))) for block in decoder_layers(model))


def _region(module: nn.Module, part: str, counter: Counter) -> Iterator[Any]:
    def enter(*_: Any) -> None:
        counter.region.append(part)

    def leave(*_: Any) -> None:
        counter.region.pop()

    # Before the hook that runs the indexer, which belongs to the attention module.
    yield module.register_forward_pre_hook(enter, prepend=True)
    yield module.register_forward_hook(leave)


def _reference_only(counter: Counter) -> Iterator[Any]:
    """Replaces what the attached layers call by reference implementations that know their part."""

    def reference(part: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        return counter.wrapped(part, functools.partial(operation, impl="reference"))

    yield mock.patch.object(layer, "index_topk", reference("index_scan", ops.index_topk))
    yield mock.patch.object(layer, "sparse_attention", reference("attention", ops.sparse_attention))
    yield mock.patch.object(layer, "dense_attention", reference("attention", ops.dense_attention))
    yield mock.patch.object(caches, "quantize_index_keys", reference("indexer_projections", ops.quantize_index_keys))
    append = caches.IndexedLayer.append_index
    yield mock.patch.object(caches.IndexedLayer, "append_index", counter.wrapped("indexer_projections", append))
    yield mock.patch.object(caches.IndexedLayer, "update", counter.wrapped("attention", caches.IndexedLayer.update))
    rows = counter.wrapped("attention", LatentLayer.append_rows)
    yield mock.patch.object(LatentLayer, "append_rows", rows)
    # Dense layers ask whether the compiled kernel takes their tensors and would turn to torch's own otherwise.
    yield mock.patch.object(layer.native_support, "gap", return_value=None)
    yield mock.patch.object(attention, "_index_few_tokens", return_value=False)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: torch.Tensor) -> int:
    """Of what the tensor reads: dims that repeat the same numbers count once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return numbers * tensor.element_size()
