"""Every way of decoding gives the same tokens with a cache as without one."""

import copy

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import dsa
from dsa.modules.cache import reserve
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

NEW = 12


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    # fp64: runs of different batch shapes must not differ by rounding.
    model = tiny_model("llama").double()
    model.generation_config.eos_token_id = None
    dsa.attach(model, TINY_CONFIG)
    return model


def generate(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:
    arguments = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
        **kwargs,
    }
    return model.generate(tokens, **arguments)


PROMPT = tiny_tokens(2, 31)

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_cached_equals_uncached(model: PreTrainedModel, strategy: dict) -> None:
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(generate(model, PROMPT, use_cache=use_cache, **strategy))
    assert torch.equal(*runs)


VARIANTS = {
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_other_ways_to_the_greedy_tokens(model: PreTrainedModel, variant: dict) -> None:
    prompt = PROMPT[:1]
    assert torch.equal(generate(model, prompt, **variant), generate(model, prompt, use_cache=False))


def test_assisted_decoding(model: PreTrainedModel) -> None:
    prompt = PROMPT[:1]
    assistant = tiny_model("llama", seed=1).double()
    assisted = generate(model, prompt, assistant_model=assistant)
    assert torch.equal(assisted, generate(model, prompt, use_cache=False))


def test_assisted_by_itself_accepts_and_crops(model: PreTrainedModel) -> None:
    prompt = PROMPT[:1]
    assistant = copy.deepcopy(model)
    assisted = generate(model, prompt, assistant_model=assistant)
    assert torch.equal(assisted, generate(model, prompt, use_cache=False))


def test_left_padded_batch(model: PreTrainedModel) -> None:
    short, long = PROMPT[:1, :19], PROMPT[1:]
    padding = torch.zeros(1, 12, dtype=torch.long)
    batch = torch.cat((torch.cat((padding, short), dim=1), long))
    mask = torch.ones_like(batch)
    mask[0, :12] = 0
    together = generate(model, batch, attention_mask=mask)
    assert torch.equal(together[0, 31:], generate(model, short)[0, 19:])
    assert torch.equal(together[1, 31:], generate(model, long)[0, 31:])


def test_multi_turn_reuse(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    first = generate(model, PROMPT[:1], past_key_values=cache)
    question = torch.cat((first, tiny_tokens(1, 9, seed=3)), dim=1)
    second = generate(model, question, past_key_values=cache)
    assert cache.get_seq_length() == second.shape[1] - 1
    assert torch.equal(second, generate(model, question, use_cache=False))


def test_padding_between_turns(model: PreTrainedModel) -> None:
    """Right padding left in the cache by a first turn is a hole that nobody may read."""
    real = tiny_tokens(1, 25)
    holed = torch.cat((real[:, :14], torch.zeros(1, 5, dtype=torch.long), real[:, 14:]), dim=1)
    mask = torch.ones_like(holed)
    mask[:, 14:19] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(real).logits
        once = model(holed, attention_mask=mask, position_ids=positions).logits
        cache = model(holed[:, :19], attention_mask=mask[:, :19], position_ids=positions[:, :19]).past_key_values
        later = model(holed[:, 19:], attention_mask=mask, position_ids=positions[:, 19:], past_key_values=cache).logits
    # The always-read local window counts positions, holes included, so only the last 14 tokens' budget differs.
    torch.testing.assert_close(later, once[:, 19:], atol=1e-9, rtol=0)
    torch.testing.assert_close(once[:, :14], expected[:, :14], atol=1e-9, rtol=0)


def test_packed_documents_do_not_see_each_other(model: PreTrainedModel) -> None:
    first, second = tiny_tokens(1, 23), tiny_tokens(1, 18, seed=1)
    positions = torch.cat((torch.arange(23), torch.arange(18)))[None]
    with torch.no_grad():
        packed = model(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
        alone = [model(document, use_cache=False).logits for document in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-9, rtol=0)


def test_batch_of_different_caches_in_turn(model: PreTrainedModel) -> None:
    """Two conversations interleaved on one model do not mix."""
    prompts = tiny_tokens(2, 20)
    with torch.no_grad():
        expected = [model(prompts[row : row + 1], use_cache=False).logits for row in range(2)]
        caches, parts = [None, None], [[], []]
        for begin in (0, 10):
            for row in range(2):
                output = model(prompts[row : row + 1, begin : begin + 10], past_key_values=caches[row])
                caches[row] = output.past_key_values
                parts[row].append(output.logits)
    for row in range(2):
        torch.testing.assert_close(torch.cat(parts[row], dim=1), expected[row], atol=1e-9, rtol=0)


def test_generate_stays_in_the_reserved_room(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    reserve(cache, 1000)
    model(PROMPT[:1, :10], past_key_values=cache)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    generate(model, PROMPT[:1], past_key_values=cache, max_new_tokens=300)
    assert cache.get_seq_length() == 330
    assert [layer.keys.data_ptr() for layer in cache.layers] == where


def test_gradients_flow_through_the_sparse_model() -> None:
    model = tiny_model("llama").double().train()
    dsa.attach(model, TINY_CONFIG)
    tokens = tiny_tokens(2, 24)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is None for name, grad in grads.items() if ".indexer." in name)
    assert all(grad is not None and grad.isfinite().all() for name, grad in grads.items() if ".indexer." not in name)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tokens = tiny_tokens(1, 24)
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").double().train()
        dsa.attach(model, TINY_CONFIG)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*grads)
