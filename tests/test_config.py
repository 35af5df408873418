"""Changing a configuration as a whole."""

from dsa import DSAConfig, LayerConfig

LAYERS = {0: LayerConfig(dense=True), 1: LayerConfig(top_k=512), 2: LayerConfig(top_k=384, local=64), 3: {"share": 1}}


def test_a_new_budget_is_meant_for_every_layer() -> None:
    config = DSAConfig(top_k=1024, local=128, layers=LAYERS)
    assert [config.layer_top_k(layer) for layer in (1, 2, 3, 4)] == [512, 384, 512, 1024]
    changed = config.replace(top_k=600)
    assert [changed.layer_top_k(layer) for layer in (1, 2, 3, 4)] == [600] * 4
    assert (changed.layer_local(2), changed.is_dense(0), changed.shared_with(3)) == (64, True, 1)
    assert config.replace(local=32).layer_local(2) == 32
    assert config.replace(local=32).layer_top_k(2) == 384


def test_a_budget_given_with_layers_is_taken_as_it_is() -> None:
    config = DSAConfig(layers=LAYERS)
    assert config.replace(top_k=600, layers=LAYERS).layer_top_k(1) == 512
    assert config.replace(sinks=2).layer_top_k(1) == 512


def test_a_quarter_of_the_index_dims_carries_rope() -> None:
    sizes = {1: 0, 2: 2, 4: 2, 7: 2, 8: 2, 16: 4, 32: 8, 64: 16, 128: 32}
    assert {dim: DSAConfig(index_head_dim=dim).rope_dim for dim in sizes} == sizes
    assert DSAConfig(index_head_dim=64, index_rope_dim=0).rope_dim == 0
