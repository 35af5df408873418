"""Attached models on the compiled kernels: they are what runs, and they compute what the reference does.

The other tests of models use fp64, which the kernels leave to the reference.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

import dsa
from dsa.modules.cache import reserve
from dsa.ops import native_support
from dsa.testing.cases import IMPLEMENTATIONS
from dsa.testing.tiny_models import ONE_OF_EACH_KIND, TINY_CONFIG, tiny_model, tiny_tokens

TOKENS = 37

COMPILED = {operation for operation, names in IMPLEMENTATIONS.items() if "native" in names}
"""Operations that have a kernel."""


@pytest.fixture(scope="module", autouse=True)
def needs_the_library() -> None:
    reason = native_support.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that were called, once something has run."""
    names: set[str] = set()
    call = native_support.call

    def recorded(name: str, arguments: object) -> None:
        names.add(name)
        call(name, arguments)

    monkeypatch.setattr(native_support, "call", recorded)
    return names


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Read in chunks and token by token, with a cache."""
    parts, cache = [], DynamicCache(config=model.config)
    with torch.no_grad():
        for begin, stop in [(0, 19), (19, 30), (30, 31), (31, 32), (32, TOKENS)]:
            parts.append(model(tokens[:, begin:stop], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("index_dtype", ["int8", "fp32"])
@pytest.mark.parametrize("model_type", ONE_OF_EACH_KIND)
def test_agrees_with_the_reference(
    model_type: str, index_dtype: str, called: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(2, TOKENS)
    dsa.attach(model, TINY_CONFIG, index_dtype=index_dtype)
    native = logits(model, tokens)
    assert COMPILED & {"index_topk", "sparse_attention"} <= called
    assert ("quantize_keys" in called) == (index_dtype == "int8")
    called.clear()
    monkeypatch.setattr(native_support, "gap", lambda *tensors: "switched off")
    torch.testing.assert_close(logits(model, tokens), native, atol=1e-3, rtol=0)
    assert not called


def test_short_contexts_need_no_selection(called: set[str]) -> None:
    model = tiny_model("llama")
    dsa.attach(model, TINY_CONFIG, top_k=TOKENS)
    logits(model, tiny_tokens(1, TOKENS))
    assert called == {"quantize_keys", "index_projection", "dense_attention"}


def allocated(step: Callable[[], object]) -> int:
    """Bytes of all tensors that are made while `step` runs, the freed ones too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.skipif("index_topk" not in COMPILED, reason="the reference's scores grow with the context")
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left padding"])
def test_decoding_allocates_nothing_that_grows_with_the_context(padded: bool) -> None:
    model = tiny_model("llama", max_position_embeddings=1 << 20)
    dsa.attach(model, TINY_CONFIG, layers={0: {"dense": True}})
    cache, taken = DynamicCache(), {}
    reserve(cache, 9000)
    for length in (1000, 8000):
        new = tiny_tokens(1, length - cache.get_seq_length())
        mask = torch.ones(1, length + 1, dtype=torch.bool)
        mask[:, 0] = not padded
        with torch.no_grad():
            model(new, past_key_values=cache, attention_mask=mask[:, :-1])
            step = partial(model, tiny_tokens(1, 1), past_key_values=cache, attention_mask=mask)
            taken[length] = allocated(step)
    # The padding mask itself is a few bytes a token; one copy of the smallest tensor of the cache would be 8.
    growth = (taken[8000] - taken[1000]) / 7000
    assert growth <= (8 if padded else 1)
