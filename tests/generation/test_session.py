"""A session writes what `generate` writes, however its prompt came into the cache, and can be stopped anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import dsa
from dsa.generation.sampling import GREEDY, Sampling
from dsa.generation.session import Session, common_prefix
from dsa.models.context import DSAContext
from dsa.modules.cache import reserve
from dsa.runs.progress import Advance
from dsa.testing.born_with_dsa import born_model
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

NEW = 8
PROMPT = tiny_tokens(1, 43)[0].tolist()
OTHER = [*PROMPT[:29], *tiny_tokens(1, 20, seed=5)[0].tolist()]
END = 7


def attached(family: str = "llama") -> Any:
    # fp64: runs of different batch shapes must not differ by rounding.
    model = tiny_model(family).double()
    model.generation_config.eos_token_id = None
    dsa.attach(model, TINY_CONFIG)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return attached()


def generated(model: Any, prompt: list[int], sampling: Sampling = GREEDY, chunk: int = 16) -> list[int]:
    """What `dsa generate` wrote before there were sessions: transformers' `generate`, its prompt in chunks."""
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(sampling.seed or 0)
    cache = DynamicCache(config=model.config)
    reserve(cache, len(prompt) + NEW)
    made = model.generate(
        torch.tensor([prompt]),
        past_key_values=cache,
        prefill_chunk_size=chunk,
        max_new_tokens=NEW,
        pad_token_id=0,
        **options,
    )
    return made[0, len(prompt) :].tolist()


def written(session: Session, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    session.read(prompt, new_tokens=NEW)
    return list(session.write(NEW, sampling))


@pytest.mark.parametrize("chunk", [1, 16, 43, 4096])
def test_greedy(model: Any, chunk: int) -> None:
    session = Session(model, chunk=chunk)
    assert written(session, PROMPT) == generated(model, PROMPT)
    assert session.token_ids[: len(PROMPT)] == PROMPT
    assert session.cache.get_seq_length() == len(session.token_ids) == len(PROMPT) + NEW - 1


@pytest.mark.parametrize("sampling", [Sampling(0.7, 1.0, 3), Sampling(1.3, 0.8, 4)])
def test_sampling_takes_the_random_numbers_that_generate_takes(model: Any, sampling: Sampling) -> None:
    expected = generated(model, PROMPT, sampling)
    session = Session(model)
    assert written(session, PROMPT, sampling) == expected
    assert written(session, PROMPT, sampling) == expected
    torch.manual_seed(sampling.seed or 0)
    assert written(session, PROMPT, Sampling(sampling.temperature, sampling.top_p)) == expected
    others = {tuple(written(session, PROMPT, Sampling(1.3, 1.0, seed))) for seed in range(2)}
    assert len(others) > 1


def test_the_models_own_generation_settings(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generated(model, PROMPT)
    for name, value in (("repetition_penalty", 1.9), ("suppress_tokens", plain[:1]), ("no_repeat_ngram_size", 2)):
        monkeypatch.setattr(model.generation_config, name, value)
    expected = generated(model, PROMPT)
    assert expected != plain
    assert written(Session(model), PROMPT) == expected


@pytest.mark.parametrize("as_list", [True, False])
def test_a_token_that_ends_the_text_is_the_last(model: Any, monkeypatch: pytest.MonkeyPatch, as_list: bool) -> None:
    plain = generated(model, PROMPT)
    end = plain[4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 10**6] if as_list else end)
    found = written(Session(model), PROMPT)
    assert found == generated(model, PROMPT)
    assert found == plain[: plain.index(end) + 1]


def test_only_what_is_new_is_read(model: Any) -> None:
    session = Session(model)
    first = written(session, PROMPT)
    assert (session.timings.held, session.timings.read) == (0, 43)
    # The next turn of a conversation: what was written is held, but for its last token.
    turn = [*PROMPT, *first, 3, 4, 5]
    assert written(session, turn) == generated(model, turn)
    assert (session.timings.held, session.timings.read) == (43 + NEW - 1, 4)
    assert written(session, OTHER) == generated(model, OTHER)
    assert (session.timings.held, session.timings.read) == (29, 20)
    assert written(session, PROMPT[:20]) == generated(model, PROMPT[:20])
    assert (session.timings.held, session.timings.read) == (19, 1)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_caches_that_cannot_give_tokens_back(family: str) -> None:
    """Sliding windows have forgotten what lies before them: all is read again, and comes out right."""
    model = attached(family)
    session = Session(model)
    for prompt in (PROMPT, OTHER, [*PROMPT, 3, 4]):
        assert written(session, prompt) == generated(model, prompt)


def test_a_model_born_with_dsa() -> None:
    model = born_model("deepseek_v32").double()
    model.generation_config.eos_token_id = None
    dsa.accelerate(model)
    session = Session(model, chunk=16)
    for prompt in (PROMPT, OTHER):
        assert written(session, prompt) == generated(model, prompt)
    assert session.timings.held == 29


def test_a_cache_that_is_handed_in(model: Any) -> None:
    first = Session(model)
    first.read(PROMPT)
    session = Session(model, cache=first.cache, token_ids=first.token_ids)
    assert written(session, OTHER) == generated(model, OTHER)
    assert session.timings.held == 29
    assert session.cache is first.cache


def test_others_have_their_turn_between_chunks_and_tokens(model: Any) -> None:
    """Two sessions on one model, a chunk or a token at a time."""
    one, two = Session(model, chunk=5), Session(model, chunk=7)
    reading = [one.chunks(PROMPT), two.chunks(OTHER)]
    held: list[list[int]] = [[], []]
    for _ in range(10):
        for number, each in enumerate(reading):
            held[number] += [done for done in [next(each, None)] if done is not None]
    assert held[0] == [5, 10, 15, 20, 25, 30, 35, 40, 43]
    assert held[1] == [7, 14, 21, 28, 35, 42, 49]
    pairs = list(zip(one.write(NEW), two.write(NEW), strict=True))
    assert [a for a, _ in pairs] == generated(model, PROMPT)
    assert [b for _, b in pairs] == generated(model, OTHER)


def test_closing_stops(model: Any) -> None:
    session = Session(model, chunk=10)
    reading = session.chunks(PROMPT)
    assert [next(reading), next(reading)] == [10, 20]
    reading.close()
    assert session.token_ids == PROMPT[:20]
    with pytest.raises(ValueError, match=r"no prompt has been read to its end; call read\(ids\)"):
        next(session.write(NEW))
    session.read(PROMPT)
    assert session.timings.held == 20
    writing = session.write(NEW)
    some = [next(writing), next(writing)]
    writing.close()
    assert some == generated(model, PROMPT)[:2]
    assert written(session, PROMPT) == generated(model, PROMPT)


def test_a_flag_stops(model: Any) -> None:
    asked = 0

    def third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    session = Session(model, chunk=10, stop=third_time)
    session.read(PROMPT)
    assert session.token_ids == PROMPT[:20]
    assert list(session.write(NEW)) == []
    session.stop = lambda: False
    session.read(PROMPT)
    asked = 0
    session.stop = third_time
    assert list(session.write(NEW)) == generated(model, PROMPT)[:2]


def test_writing_ends_where_another_prompt_is_read(model: Any) -> None:
    session = Session(model)
    session.read(PROMPT)
    writing = session.write(NEW)
    next(writing)
    session.read(OTHER)
    assert next(writing, None) is None
    assert list(session.write(NEW)) == generated(model, OTHER)


def test_an_interrupted_pass_leaves_the_cache_whole(model: Any) -> None:
    """Ctrl-C in the middle of a pass: some layers have its tokens, others have not."""
    session = Session(model, chunk=20)
    reading = session.chunks(PROMPT)
    next(reading)
    layer = model.model.layers[-1]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(reading)
    hook.remove()
    assert [each.get_seq_length() for each in session.cache.layers] == [20] * len(session.cache.layers)
    assert written(session, PROMPT) == generated(model, PROMPT)
    assert session.timings.held == 20


def test_progress_counts_tokens(model: Any) -> None:
    seen: list[int] = []
    labels: list[tuple[str, int]] = []

    @contextmanager
    def progress(label: str, total: int) -> Iterator[Advance]:
        labels.append((label, total))
        yield lambda parts=1: seen.append(parts)

    session = Session(model, chunk=20)
    session.read(PROMPT, progress=progress)
    assert labels == [("Reading 43 tokens", 43)]
    assert sum(seen) == 43
    assert max(seen) < 20
    seen.clear()
    session.read(OTHER, progress=progress)
    assert labels[1:] == [("Reading 20 tokens", 20)]
    assert sum(seen) == 20


def test_timings(model: Any) -> None:
    session = Session(model)
    assert session.timings.token_s is None
    written(session, PROMPT)
    timings = session.timings
    assert timings.written == NEW
    assert timings.first_token_s is not None
    assert 0 < timings.read_s <= timings.first_token_s
    assert timings.token_s == pytest.approx(timings.later_s / (NEW - 1))
    session.read(OTHER)
    assert session.timings.written == 0


def test_a_context_of_ones_own(model: Any) -> None:
    layers: list[int] = []
    session = Session(model, chunk=20)
    with session.using(lambda: DSAContext(observer=lambda call: layers.append(call.layer), every_layer=True)):
        session.read(PROMPT)
    count = model.config.num_hidden_layers
    assert layers == [*range(count)] * 3
    assert list(session.write(NEW)) == generated(model, PROMPT)
    assert len(layers) == 3 * count


def test_room_is_made_once(model: Any) -> None:
    session = Session(model)
    session.read(PROMPT[:10], new_tokens=1000)
    where = [layer.keys.data_ptr() for layer in session.cache.layers]
    written(session, PROMPT)
    assert [layer.keys.data_ptr() for layer in session.cache.layers] == where


def test_refused(model: Any) -> None:
    session = Session(model)
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.read([])
    with pytest.raises(ValueError, match="no prompt has been read"):
        next(session.write(1))
    session.read(PROMPT)
    assert session.logits is not None
    session.logits[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        next(session.write(1))


@pytest.mark.parametrize(
    ("first", "second", "expected"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 3, 3], 1), ([1], [1, 2], 1)]
)
def test_common_prefix(first: list[int], second: list[int], expected: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == expected
