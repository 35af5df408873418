"""RoPE whose angles depend on the length: a text read in pieces has the angles of the whole."""

import pytest
import torch

import dsa
from dsa.eval.comparison import new_cache, read_chunks
from dsa.generation.session import Session
from dsa.models.context import DSAContext
from dsa.models.rope import angles_for
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

TRAINED = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.5, 3.0, 6.0, 9.0],
    "original_max_position_embeddings": TRAINED,
}
MODELS = {
    "longrope": lambda: tiny_model("phi3", rope_parameters=dict(LONG), original_max_position_embeddings=TRAINED),
    "dynamic": lambda: tiny_model(
        "llama",
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        max_position_embeddings=TRAINED,
    ),
    "yarn": lambda: tiny_model(
        "llama",
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    ),
}


@pytest.fixture(params=MODELS)
def models(request: pytest.FixtureRequest):
    """The model attached, so that everything is selected, and transformers' own."""
    make = MODELS[request.param]
    attached = make()
    dsa.attach(attached, TINY_CONFIG, top_k=4096)
    return attached, make()


def answer(model: torch.nn.Module, ids: list[int], new: int) -> list[int]:
    """transformers' own greedy answer, the whole prompt read at once."""
    made = model.generate(torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return made[0, len(ids) :].tolist()


def written(session: Session, ids: list[int], new: int) -> list[int]:
    session.read(ids, new_tokens=new)
    assert session.logits is not None
    return list(session.write(new))


@pytest.mark.parametrize("prompt", [20, 60, 100])
def test_in_chunks_as_at_once(models: tuple, prompt: int) -> None:
    attached, plain = models
    plain.generation_config.eos_token_id = attached.generation_config.eos_token_id = None
    ids = tiny_tokens(1, prompt)[0].tolist()
    session = Session(attached, chunk=16)
    session.read(ids)
    with torch.no_grad():
        whole = plain(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(session.logits, whole, rtol=1e-4, atol=1e-4)
    assert written(Session(attached, chunk=16), ids, 6) == answer(plain, ids, 6)


def test_a_session_over_the_original_length(models: tuple) -> None:
    attached, plain = models
    plain.generation_config.eos_token_id = attached.generation_config.eos_token_id = None
    session = Session(attached, chunk=16)
    ids = tiny_tokens(1, 80, seed=3)[0].tolist()
    # Short, then beyond in the middle of an answer, then longer, then shorter again.
    for length, planned, new in ((20, 4, 4), (20, 0, 20), (70, 4, 4), (80, 4, 4), (24, 4, 4)):
        session.read(ids[:length], new_tokens=planned)
        made = list(session.write(new))
        assert made == answer(fresh_again(plain), ids[:length], new), length


def fresh_again(model: torch.nn.Module) -> torch.nn.Module:
    """Dynamic angles of transformers remember what was read before."""
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq.clone()
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    return model


def test_measuring_reads_with_one_set(models: tuple) -> None:
    attached, plain = models
    ids = tiny_tokens(1, 100)
    cache = new_cache(attached, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsa.eval.comparison.CHUNK", 16)
        read_chunks(attached, ids[:, :99], cache, DSAContext, length=100)
    with torch.no_grad(), angles_for(attached, 100):
        last = attached(ids[:, 99:], past_key_values=cache).logits[0, -1]
    with torch.no_grad():
        whole = fresh_again(plain)(ids).logits[0, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)
    # What was read by others leaves the model as it was: its own next pass is that of a fresh one.
    with torch.no_grad():
        again = attached(ids[:, :40]).logits
        fresh = fresh_again(plain)(ids[:, :40]).logits
    torch.testing.assert_close(again, fresh, rtol=1e-4, atol=1e-4)
