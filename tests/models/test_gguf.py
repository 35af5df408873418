"""GGUF files as models: blocks kept as they are, and files that are damaged on purpose."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import dsa
from dsa.models.gguf_file import read_header
from dsa.models.loading import load_model
from dsa.models.packed import packed_layers
from dsa.testing.tiny_models import TINY_CONFIG, tiny_model, tiny_tokens

Kind = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSA_CACHE", str(tmp_path / "cache"))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that files of the architecture llama have."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: PreTrainedModel,
    kind: Kind = Kind.Q8_0,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    without: str = "",
    architecture: str = "",
) -> None:
    """A tiny model as llama.cpp would write it."""
    config = model.config
    arch = architecture or config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim if hasattr(config, "head_dim") else 8)
    writer.add_vocab_size(config.vocab_size)
    letters = [*(chr(33 + number) for number in range(93)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<pad>", "<s>", "</s>", *letters][: config.vocab_size])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(
        next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type),
        config.num_hidden_layers,
    )
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        theirs = f"{names.get_name(layer)}.{last}"
        if theirs == without:
            continue
        numbers = parameter.detach().float().numpy()
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            numbers = permuted(
                numbers, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            )
        if numbers.ndim == 2 and numbers.shape[1] % 32 == 0:
            writer.add_tensor(theirs, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, numbers)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize(("family", "ties"), [("llama", True), ("llama", False), ("qwen2", False)])
def test_the_blocks_are_the_weights(family: str, ties: bool, kind: Kind, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=ties)
    file = tmp_path / "tiny.gguf"
    write(file, model, kind)
    loaded = load_model(str(file))
    assert loaded.packed is not None
    packed = packed_layers(loaded.model)
    assert {layer.format for layer in packed.values()} == {kind.name}
    # Every matrix but the one whose rows are no whole blocks.
    assert len(packed) == 2 + 2 * 6
    assert (loaded.model.lm_head.source is loaded.model.model.embed_tokens) == ties
    for name, layer in packed.items():
        numbers = model.get_submodule(name).weight.detach().numpy()
        expected = gguf.dequantize(gguf.quantize(numbers, kind), kind)
        assert torch.equal(layer.numbers(), torch.from_numpy(expected))
    down = loaded.model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(down, model.model.layers[1].mlp.down_proj.weight)
    ids = tiny_tokens(1, 40)
    with torch.no_grad():
        out = loaded.model(ids).logits
        dsa.pack_weights(loaded.model, "fp32")
        exact = loaded.model(ids).logits
    assert (out - exact).norm() <= 0.05 * exact.norm()
    if kind == Kind.Q8_0:
        assert (exact - model(ids).logits).norm() <= 0.1 * exact.norm()


def test_attached_saved_and_in_another_form(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, tiny_model("llama"))
    loaded = load_model(str(file), weights="auto")
    dsa.attach(loaded.model, TINY_CONFIG)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    ids = tiny_tokens(1, 40)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    assert load_model(str(file), weights="fp32").packed is None
    other = load_model(str(file), weights="int4").packed
    assert other is not None
    assert other.formats == {"Q8_0": 2, "Q4_1": 14}


def test_blocks_without_products_are_widened_and_named(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=256, head_dim=64)
    file = tmp_path / "tiny.gguf"
    write(file, model, Kind.F16)
    loaded = load_model(str(file))
    assert loaded.packed is None

    def with_q2(writer: gguf.GGUFWriter) -> None:
        blocks = np.zeros((512, 84), np.uint8)
        writer.add_tensor("blk.0.attn_q.weight", blocks[:256], raw_dtype=Kind.Q2_K)

    write(file, model, Kind.Q8_0, with_q2, without="blk.0.attn_q.weight")
    with pytest.warns(UserWarning, match=r"tiny.gguf has blocks of Q2_K, for which there are no products"):
        loaded = load_model(str(file))
    assert (loaded.model.model.layers[0].self_attn.q_proj.weight == 0).all()


def with_scalar(name: str, value: int) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.UINT32)

    return change


def test_what_its_metadata_do_not_fit(tmp_path: Path) -> None:
    file, model = tmp_path / "tiny.gguf", tiny_model("llama")
    cases: list[tuple[dict[str, object], str]] = [
        ({"without": "blk.1.attn_q.weight"}, r"lacks the tensor of model.layers.1.self_attn.q_proj.weight"),
        ({"change": lambda w: w.add_tensor("other.weight", np.ones(3, np.float32))}, "has the tensor other.weight"),
        ({"architecture": "mamba"}, r"has the architecture 'mamba', expected one of llama, qwen2"),
        ({"change": with_scalar("llama.block_count", 10**9)}, "says that it has 1000000000 layers"),
        ({"change": with_scalar("llama.rope.dimension_count", 10**9)}, "rope.dimension_count .* is 1000000000"),
        ({"change": with_scalar("llama.attention.head_count", 0)}, "head_count .* is 0"),
        ({"change": with_scalar("llama.embedding_length", 64)}, "and its metadata make it"),
    ]
    for options, message in cases:
        write(file, model, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            load_model(str(file))
    with pytest.raises(OSError, match=r"there is no file missing.gguf; expected a GGUF file"):
        load_model("missing.gguf")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, tiny_model("llama"))
    whole = file.read_bytes()
    header = read_header(file)
    assert header.architecture == "llama"
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, header.nbytes, 37), header.nbytes, len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model: .*cut.gguf is"):
            read_header(cut)


def test_hostile_numbers_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, tiny_model("llama"))
    whole = file.read_bytes()
    bad = tmp_path / "bad.gguf"
    huge = struct.pack("<Q", 1 << 62)
    table = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    cases = [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 9), "expected version 2 or 3, got 9"),
        (8, huge, "the number of tensors is 4,611,686,018,427,387,904, more than"),
        (16, huge, "that of entries is"),
        (24, huge, "the length of the name of an entry is"),
        (table, struct.pack("<I", 99), "has 99 dims"),
        (table + 4, huge, "expected rows of a multiple of 32 numbers"),
        (table + 20, struct.pack("<I", 77), "has the unknown block type 77"),
        (table + 24, huge, "expected a multiple of 32 within"),
        (table + 24, struct.pack("<Q", 3), "expected a multiple of 32 within"),
    ]
    for at, data, message in cases:
        bad.write_bytes(whole[:at] + data + whole[at + len(data) :])
        with pytest.raises(ValueError, match=message):
            read_header(bad)
    # Any byte of the header may be anything: it is read or refused, and nothing else happens.
    generator = np.random.default_rng(0)
    nbytes = read_header(file).nbytes
    for _ in range(300):
        data = bytearray(whole)
        for at in generator.integers(0, nbytes, 3):
            data[at] = generator.integers(0, 256)
        bad.write_bytes(data)
        with contextlib.suppress(ValueError):
            read_header(bad)
