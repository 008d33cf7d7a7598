"""What each rank keeps of a model, which numbers of ranks fit, and that a source reads these parts alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="weights need the extra octavo-engine[local]")

import torch
from safetensors.torch import save_file

from octavo_engine.errors import CorruptModelFile, InvalidConfig, UnsupportedModel
from octavo_engine.parallel.plan import ShardPlan, check_size, vocabulary_part
from octavo_engine.testing import tiny_config
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.files import SafetensorsFiles
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.source import GGUFSource, Source
from octavo_engine.weights.stored import StoredTensor

MakeGGUF = Callable[..., Path]
LAYER = "model.layers.0"
BLOCK_TYPES = [kind for kind in TensorType if kind.block_elements > 1]


def spans(name: str, size: int, **config: int) -> list[tuple[int, int]]:
    plans = [ShardPlan(replace(tiny_config(), **config), rank, size) for rank in range(size)]
    cuts = [plan(name) for plan in plans]
    assert all(cut is not None for cut in cuts)
    return [(cut.start, cut.stop) for cut in cuts if cut is not None]


def test_heads_go_with_the_kv_heads_that_they_attend_with() -> None:
    assert spans(f"{LAYER}.self_attn.q_proj.weight", 4) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert spans(f"{LAYER}.self_attn.k_proj.weight", 2) == [(0, 16), (16, 32)]
    assert spans(f"{LAYER}.self_attn.v_proj.bias", 4) == [(0, 16), (0, 16), (16, 32), (16, 32)]
    assert [ShardPlan(tiny_config(), rank, 4).config.num_kv_heads for rank in range(4)] == [1, 1, 1, 1]


def test_columns_are_cut_where_the_rows_before_them_are() -> None:
    plan = ShardPlan(tiny_config(), 1, 2)
    assert plan(f"{LAYER}.self_attn.o_proj.weight") == Cut(1, 32, 64, 64)
    assert plan(f"{LAYER}.mlp.down_proj.weight") == Cut(1, 24, 48, 48)
    assert plan(f"{LAYER}.mlp.up_proj.weight") == Cut(0, 24, 48, 48)


def test_a_bias_of_what_is_added_up_is_whole_and_added_once() -> None:
    plan = ShardPlan(tiny_config(), 1, 2)
    assert plan(f"{LAYER}.self_attn.o_proj.bias") is None
    assert plan.is_added_once(f"{LAYER}.self_attn.o_proj.bias")
    assert not plan.is_added_once(f"{LAYER}.self_attn.q_proj.bias")
    assert not plan.is_added_once(f"{LAYER}.input_layernorm.weight")


@pytest.mark.parametrize(("vocab_size", "size"), [(97, 2), (97, 4), (96, 4), (5, 5)])
def test_every_token_has_one_rank(vocab_size: int, size: int) -> None:
    parts = [vocabulary_part(vocab_size, rank, size) for rank in range(size)]
    assert [token_id for part in parts for token_id in part] == list(range(vocab_size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("heads", "size", "works"),
    [((9, 3), 2, "use 1 or 3"), ((4, 2), 3, "use 1 or 2 or 4"), ((6, 4), 3, "use 1 or 2")],
    ids=["the demo model's", "even", "KV heads neither divide nor are divided"],
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(heads: tuple[int, int], size: int, works: str) -> None:
    config = replace(tiny_config(), num_heads=heads[0], num_kv_heads=heads[1], intermediate_size=48)
    with pytest.raises(
        InvalidConfig, match=f"tensor_parallel_size {size} does not fit m: it has {heads[0]} .*{works}$"
    ):
        check_size(config, size, lambda name: 1, "m")


def test_blocks_of_columns_are_not_torn() -> None:
    config = replace(tiny_config(), intermediate_size=96)
    check_size(config, 2, lambda name: 1, "m")
    with pytest.raises(InvalidConfig, match=r"use 1$"):
        check_size(config, 2, lambda name: 32 if "down_proj" in name else 1, "m")


def test_another_architecture_is_not_split() -> None:
    with pytest.raises(UnsupportedModel, match="Other cannot be split over ranks; these can: LlamaForCausalLM"):
        check_size(replace(tiny_config(), architecture="Other"), 2, lambda name: 1, "m")


def test_weights_in_several_tensors_are_not_split() -> None:
    with pytest.raises(UnsupportedModel, match=r"q_proj\.qweight.*cannot be split"):
        ShardPlan(tiny_config(), 0, 2)(f"{LAYER}.self_attn.q_proj.qweight")


def values(weight: torch.Tensor | StoredTensor) -> torch.Tensor:
    return weight.values() if isinstance(weight, StoredTensor) else weight


def test_a_gguf_file_is_read_in_parts(make_gguf: MakeGGUF) -> None:
    """Every type of tensor is in the file, rotated rows too; two ranks share its one KV head."""
    rng = np.random.default_rng(3)
    down = rng.integers(0, 60, size=(64, 4 * 34), dtype=np.uint8)
    wide = {
        f"blk.0.ffn_{name}.weight": (0, rng.random((128, 64), np.float32).view(np.uint8)) for name in ("gate", "up")
    }
    biases = {f"blk.0.attn_{name}.bias": (0, rng.random(64, np.float32).view(np.uint8)) for name in ("q", "output")}
    path = make_gguf({"llama.feed_forward_length": 128}, {"blk.0.ffn_down.weight": (8, down), **wide, **biases})
    source: Source = GGUFSource(path)
    whole = {name: values(weight) for name, weight in source.weights()}
    assert source.column_block(f"{LAYER}.mlp.down_proj.weight") == 32
    assert source.column_block(f"{LAYER}.self_attn.o_proj.weight") == 1
    for rank in range(2):
        plan = ShardPlan(source.config, rank, 2)
        for name, weight in source.weights(plan):
            cut, expected = plan(name), whole[name]
            if cut is not None:
                expected = expected[cut.span] if cut.axis == 0 else expected[:, cut.span]
            assert tuple(weight.shape) == tuple(expected.shape), name
            assert torch.equal(values(weight), expected), name


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "in a stack of experts"])
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_type_of_a_gguf_file_is_read_in_parts(make_gguf: MakeGGUF, kind: TensorType, stacked: bool) -> None:
    """Rows, and columns of whole blocks; what these mean is what the same bytes mean in the whole."""
    block = kind.block_elements
    stack = np.random.default_rng(int(kind)).integers(0, 256, (2, 64, 3 * kind.block_bytes), np.uint8)
    stack &= 0xBB  # no scale is NaN or infinite, wherever it lies
    metadata = {"llama.feed_forward_length": 3 * block}
    names = [f"{LAYER}.mlp.down_proj.weight"]
    tensors = {"blk.0.ffn_down.weight": (int(kind), stack[0])}
    if stacked:
        metadata |= {"llama.expert_count": 2, "llama.expert_used_count": 1}
        names = [f"{LAYER}.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(2)]
        tensors = {"blk.0.ffn_down.weight": None, "blk.0.ffn_down_exps.weight": (int(kind), stack)}
    source = GGUFSource(make_gguf(metadata, tensors))
    for name, rows in zip(names, stack, strict=False):
        assert source.column_block(name) == block
        whole = torch.from_numpy(dequantize(rows, kind, (64, 3 * block)))
        for cut in (Cut(0, 5, 9, 64), Cut(1, 0, block, 3 * block), Cut(1, block, 3 * block, 3 * block)):
            ((_, part),) = source.weights(lambda _, cut=cut: cut, name.__eq__)
            assert torch.equal(values(part), cut.part(whole))


def test_a_safetensors_file_is_read_in_parts(tmp_path: Path) -> None:
    tensors = {"a.q_proj.weight": torch.rand(64, 8), "a.o_proj.weight": torch.rand(8, 64), "norm": torch.rand(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    plan = ShardPlan(tiny_config(), 1, 2)
    parts = dict(SafetensorsFiles(tmp_path).read(plan))
    assert torch.equal(parts["a.q_proj.weight"], tensors["a.q_proj.weight"][32:])
    assert torch.equal(parts["a.o_proj.weight"], tensors["a.o_proj.weight"][:, 32:])
    assert torch.equal(parts["norm"], tensors["norm"])
    assert parts["a.o_proj.weight"].untyped_storage().nbytes() == 8 * 32 * 4


def test_a_tensor_of_another_size_is_not_cut(tmp_path: Path, make_gguf: MakeGGUF) -> None:
    save_file({"a.q_proj.weight": torch.rand(128, 8)}, tmp_path / "model.safetensors")
    plan = ShardPlan(tiny_config(), 0, 2)
    with pytest.raises(CorruptModelFile, match=r"a\.q_proj\.weight.*expected 64 rows, found shape \[128, 8\]"):
        dict(SafetensorsFiles(tmp_path).read(plan))
    source = GGUFSource(make_gguf(tensors={"blk.0.attn_output.weight": (0, np.zeros((64, 512), np.uint8))}))
    with pytest.raises(CorruptModelFile, match=r"attn_output.*expected 64 columns, found shape \[64, 128\]"):
        dict(source.weights(ShardPlan(source.config, 0, 2)))
