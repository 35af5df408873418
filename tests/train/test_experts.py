"""The biases of routers move towards equal load, by what the step's tokens did."""

from __future__ import annotations

import torch

from dsa.testing.tiny_models import VOCABULARY, tiny_model
from dsa.train.experts import BIAS, ExpertBalance
from dsa.train.processes import Processes


def test_biases_move_against_the_load() -> None:
    model = tiny_model("deepseek_v3").train()
    balance = ExpertBalance(model, 0.25, Processes())
    (name,) = balance.routers
    router = model.get_submodule(name)
    chosen = []
    router.register_forward_hook(lambda module, args, output: chosen.append(output[2].flatten()))
    ids = torch.randint(3, VOCABULARY, (1, 40))
    with balance.watching():
        model(ids)
        model(ids)
        model.eval()(ids)
    model(ids)
    counted = torch.bincount(torch.cat(chosen[:2]), minlength=4)
    assert torch.equal(balance.loads[name], counted.float())
    before = getattr(router, BIAS).clone()
    balance.update()
    assert torch.equal(getattr(router, BIAS) - before, 0.25 * torch.sign(counted.float().mean() - counted))
    assert not balance.loads[name].any()


def test_load_becomes_more_equal() -> None:
    torch.manual_seed(0)
    model = tiny_model("deepseek_v3").train()
    balance = ExpertBalance(model, 0.01, Processes())
    (name,) = balance.routers
    ids = torch.randint(3, VOCABULARY, (4, 64))

    def spread() -> float:
        model(ids)
        load = balance.loads[name]
        return float((load / load.mean() - 1).abs().max())

    with balance.watching(), torch.no_grad():
        first = spread()
        for _ in range(60):
            balance.update()
            last = spread()
    assert last < 0.5 * first


def test_without_a_rate_nothing_is_watched() -> None:
    model = tiny_model("deepseek_v3").train()
    balance = ExpertBalance(model, 0.0, Processes())
    with balance.watching():
        model(torch.randint(3, VOCABULARY, (1, 20)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    balance.update()
    assert balance.biases == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
