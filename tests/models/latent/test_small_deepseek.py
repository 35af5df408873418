"""The small trained DeepSeek-V3.2: what holds for random weights, and what only trained ones show."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import dsa
from dsa.eval.mass import MassObserver
from dsa.ops import pack_latents, sparse_attention

SEQ_LEN = 1024


def load(folder: Path, **given: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()


@pytest.fixture(scope="module")
def eager(small_deepseek: Path) -> PreTrainedModel:
    return load(small_deepseek, attn_implementation="eager")


@pytest.fixture(scope="module")
def accelerated(small_deepseek: Path) -> PreTrainedModel:
    model = load(small_deepseek)
    dsa.accelerate(model)
    return model


def logits(model: PreTrainedModel, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **given).logits


def test_it_is_a_deepseek_v32_of_every_part(accelerated: PreTrainedModel) -> None:
    config = accelerated.config
    assert type(accelerated).__name__ == "DeepseekV32ForCausalLM"
    assert (config.index_topk, config.kv_lora_rank) == (SEQ_LEN // 8, 128)
    assert config.n_shared_experts
    assert config.n_routed_experts > config.num_experts_per_tok
    assert config.n_group > config.topk_group
    biases = [layer.mlp.gate.e_score_correction_bias for layer in accelerated.model.layers[1:]]
    assert all(bias.any() for bias in biases)


def test_logits_and_selections(eager: PreTrainedModel, accelerated: PreTrainedModel, some_text: torch.Tensor) -> None:
    ids = some_text[:, :SEQ_LEN]
    theirs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda module, args, out: theirs.append(out))
        for layer in eager.model.layers
    ]
    expected = logits(eager, ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    ours: list[Any] = []
    context = dsa.DSAContext(observer=lambda call: ours.append(call.indices))
    found = logits(accelerated, ids, dsa_context=context)
    budget = accelerated.config.index_topk
    same = torch.ones(SEQ_LEN, dtype=torch.bool)
    for mine, its in zip(ours, theirs, strict=True):
        same[budget:] &= (mine[0, budget:].sort().values == its[0, budget:].sort().values).all(dim=-1)
    # Where two scores at the edge of the budget lie within rounding either may be taken, and what follows moves a bit.
    assert same.float().mean() > 0.99
    alike = SEQ_LEN if same.all() else int((~same).nonzero()[0])
    torch.testing.assert_close(found[:, :alike], expected[:, :alike], atol=1e-4, rtol=0)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0)


def test_generation(eager: PreTrainedModel, accelerated: PreTrainedModel, some_text: torch.Tensor) -> None:
    prompts = torch.stack((some_text[0, :300], some_text[0, 1000:1300]))
    mask = torch.ones_like(prompts)
    mask[1, :60] = 0
    given: Any = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    found = accelerated.generate(prompts, **given)
    assert torch.equal(found, eager.generate(prompts, **given))


def test_it_predicts_and_selects(accelerated: PreTrainedModel, some_text: torch.Tensor) -> None:
    """What random weights do not show: the text is no surprise, and attention lies where the indexers look."""
    ids = some_text[:, :SEQ_LEN]
    config = accelerated.dsa_accelerated.report.config
    observer = MassObserver(config, SEQ_LEN // 2)
    dense = logits(accelerated, ids, dsa_context=dsa.DSAContext(mode="dense", observer=observer))
    sparse = logits(accelerated, ids)
    losses = [
        float(torch.nn.functional.cross_entropy(each[0, SEQ_LEN // 2 : -1], ids[0, SEQ_LEN // 2 + 1 :]))
        for each in (dense, sparse)
    ]
    assert losses[0] < 5.5
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert sum(row.dsa for row in observer.layers) >= 0.95 * sum(row.oracle for row in observer.layers)


def test_fp8_rows_move_attention_little(accelerated: PreTrainedModel, some_text: torch.Tensor) -> None:
    """Each layer's output for the same input: ten times less than with random weights, and than the rows mixed."""
    errors = []

    def observe(call: dsa.AttentionCall) -> None:
        indices = call.indices
        assert indices is not None
        layer: Any = accelerated.model.layers[call.layer].self_attn
        up_value = layer.kv_b_proj.weight.unflatten(0, (layer.heads, -1))[:, layer.nope_dim :]

        def output(key: Any, value: Any) -> torch.Tensor:
            mixed, _ = sparse_attention(call.query, key, value, indices, scale=call.scale)
            return layer.o_proj(torch.einsum("bthl,hvl->bthv", mixed, up_value).flatten(2))

        rows, latent = call.key.bfloat16().float(), layer.latent_dim
        expected = output(rows, rows[..., :latent])
        found = output(pack_latents(call.key.squeeze(2), latent), None)
        errors.append(float((found - expected).norm() / expected.norm()))

    logits(accelerated, some_text[:, :SEQ_LEN], dsa_context=dsa.DSAContext(observer=observe))
    assert len(errors) == 4
    assert max(errors) < 2e-2


def test_fp8_rows_keep_the_top_token(
    small_deepseek: Path, accelerated: PreTrainedModel, some_text: torch.Tensor
) -> None:
    packed = load(small_deepseek)
    dsa.accelerate(packed, cache="fp8")
    ids = some_text[:, :SEQ_LEN]
    found, expected = (logits(model, ids, use_cache=True).argmax(dim=-1) for model in (packed, accelerated))
    assert (found == expected).float().mean() > 0.98


def test_plain_transformers_in_a_process_of_its_own(
    small_deepseek: Path, accelerated: PreTrainedModel, some_text: torch.Tensor, tmp_path: Path
) -> None:
    ids = some_text[:, :300]
    code = (
        "import sys\n"
        "sys.modules['dsa'] = None\n"
        "import torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(small_deepseek)!r}, dtype=torch.float32).eval()\n"
        "assert type(model).__name__ == 'DeepseekV32ForCausalLM'\n"
        f"with torch.no_grad(): logits = model(torch.tensor({ids.tolist()})).logits\n"
        f"save_file({{'logits': logits}}, {str(tmp_path / 'out.safetensors')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    plain = load_file(tmp_path / "out.safetensors")["logits"]
    torch.testing.assert_close(logits(accelerated, ids), plain, atol=1e-4, rtol=0)
