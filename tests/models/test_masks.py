"""Masks as ranges: every mask transformers makes, compared with its own boolean mask."""

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from dsa.models import masks
from dsa.models.masks import split_mask, visible_ranges

PACKED_POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
PACKED_SEQUENCES = (PACKED_POSITIONS == 0).cumsum(1)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9])
NOTHING = torch.tensor([[0] * 9, [1] * 9])
HOLES = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1], [1] * 9])

CASES = {
    "causal": {"q_length": 9, "kv_length": 9},
    "decode": {"q_length": 1, "kv_length": 9, "q_offset": 8},
    "chunk": {"q_length": 4, "kv_length": 9, "q_offset": 5},
    "static prefill": {"q_length": 4, "kv_length": 9},
    "static decode": {"q_length": 1, "kv_length": 9, "q_offset": 4},
    "left": {"q_length": 9, "kv_length": 9, "attention_mask": LEFT},
    "left decode": {"q_length": 1, "kv_length": 9, "q_offset": 8, "attention_mask": LEFT},
    "right": {"q_length": 9, "kv_length": 9, "attention_mask": RIGHT},
    "nothing": {"q_length": 9, "kv_length": 9, "attention_mask": NOTHING},
    "holes": {"q_length": 9, "kv_length": 9, "attention_mask": HOLES},
    "holes chunk": {"q_length": 3, "kv_length": 9, "q_offset": 6, "attention_mask": HOLES},
    "window": {"q_length": 9, "kv_length": 9, "mask_function": sliding_window_causal_mask_function(3)},
    "window left": {
        "q_length": 9,
        "kv_length": 9,
        "mask_function": sliding_window_causal_mask_function(3),
        "attention_mask": LEFT,
    },
    "window cached": {
        "q_length": 2,
        "kv_length": 4,
        "q_offset": 10,
        "kv_offset": 8,
        "mask_function": sliding_window_causal_mask_function(3),
    },
    "chunked": {
        "q_length": 9,
        "kv_length": 9,
        "mask_function": chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    },
    "packed": {
        "q_length": 9,
        "kv_length": 9,
        "mask_function": packed_sequence_compatibility_function(
            causal_mask_function, PACKED_POSITIONS, PACKED_SEQUENCES
        ),
    },
}


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ranges_are_transformers_mask(case: dict, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "QUERY_BLOCK_ELEMENTS", block)
    arguments = {"batch_size": 2, **case}
    boolean = arguments.get("attention_mask")
    if boolean is not None:
        arguments["attention_mask"] = boolean.bool()
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
    mask = visible_ranges(**arguments)
    tokens, keys = case["q_length"], case["kv_length"]
    start, end, kept = split_mask(mask, tokens, keys)
    if start is None:
        start, end = torch.zeros(2, tokens), torch.arange(keys - tokens + 1, keys + 1).expand(2, -1)
    positions = torch.arange(keys)
    visible = (positions >= start[..., None]) & (positions < end[..., None])
    if kept is not None:
        visible = visible & kept[:, None]
    assert torch.equal(visible.expand_as(expected), expected)


def test_plain_causal_needs_no_tensor() -> None:
    assert visible_ranges(2, 9, 9) is None
    assert visible_ranges(2, 1, 9, q_offset=8, attention_mask=torch.ones(2, 9, dtype=torch.bool)) is None


def test_users_own_masks() -> None:
    boolean = sdpa_mask(2, 9, 9, attention_mask=HOLES.bool(), allow_is_causal_skip=False)
    additive = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for ours, theirs in zip(split_mask(boolean, 9, 9), split_mask(additive, 9, 9)):
        assert torch.equal(ours, theirs)


def test_refuses_masks_that_are_not_ranges() -> None:
    dotted = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    dotted[..., 5, 2] = False
    with pytest.raises(NotImplementedError, match="2-D padding mask"):
        split_mask(dotted, 6, 6)
    by_head = torch.ones(1, 2, 6, 6, dtype=torch.bool).tril()
    by_head[:, 1, 5, 2] = False
    with pytest.raises(NotImplementedError, match="between heads"):
        split_mask(by_head, 6, 6)
