"""Packed weights in layers and models: any mix of formats, and the same logits as from expanded weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.errors import InvalidConfig
from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.llama import Llama
from octavo_engine.quant import choose
from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_engine.quant.packed import BLOCK_FORMATS, Packed
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.testing import Driver, make_runner
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import BackendUnavailable, WeightFormat, sample_tokens, unpack_weight

MakeGGUF = Callable[..., Path]
OPTIONS = LayerOptions(quant=Packed())
BLOCK_TYPES = [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q8_0]
PLANE_TYPES = [
    *(TensorType.Q5_0, TensorType.Q5_1, TensorType.IQ4_NL),
    *(TensorType.Q2_K, TensorType.Q3_K, TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K, TensorType.IQ4_XS),
]
PART_TYPES = [
    *(TensorType.MXFP4, TensorType.NVFP4, TensorType.Q8_K, TensorType.TQ1_0, TensorType.TQ2_0),
    *(TensorType.IQ1_S, TensorType.IQ1_M, TensorType.IQ2_XXS, TensorType.IQ2_XS, TensorType.IQ2_S),
    *(TensorType.IQ3_XXS, TensorType.IQ3_S),
]
# What makes scales small: bytes of a block and what becomes of them; of an f16 that is the high one of its two.
SCALE_BYTES = {
    **dict.fromkeys((TensorType.Q4_0, TensorType.Q8_0, TensorType.Q5_0, TensorType.IQ4_NL), ((1, 0x24),)),  # about 0.02
    **dict.fromkeys((TensorType.Q4_1, TensorType.Q5_1, TensorType.Q4_K, TensorType.Q5_K), ((1, 0x24), (3, 0xA8))),
    TensorType.IQ4_XS: ((1, 0x24),),
    TensorType.Q2_K: ((81, 0x24), (83, 0xA8)),
    TensorType.Q3_K: ((109, 0x24),),
    TensorType.Q6_K: ((209, 0x24),),
    TensorType.MXFP4: ((0, 0x78),),
    TensorType.NVFP4: ((0, 0x18), (1, 0x10), (2, 0x14), (3, 0x1A)),
    TensorType.Q8_K: ((3, 0x3A),),
    TensorType.TQ1_0: ((53, 0x2C),),
    TensorType.TQ2_0: ((65, 0x2C),),
    TensorType.IQ1_S: ((1, 0x28),),
    TensorType.IQ1_M: ((53, 0x40), (55, 0x28)),
    **dict.fromkeys((TensorType.IQ2_XXS, TensorType.IQ2_XS, TensorType.IQ2_S), ((1, 0x1C),)),
    **dict.fromkeys((TensorType.IQ3_XXS, TensorType.IQ3_S), ((1, 0x14),)),
}


def stored(tensor_type: TensorType, num_rows: int, num_columns: int, seed: int = 0) -> StoredTensor:
    """Return a tensor in blocks with random codes and small scales."""
    rng = np.random.default_rng(seed)
    num_blocks = num_columns // tensor_type.block_elements
    blocks = rng.integers(0, 256, (num_rows, num_blocks, tensor_type.block_bytes), dtype=np.uint8)
    for at, byte in SCALE_BYTES[tensor_type]:
        blocks[..., at] = byte
    return StoredTensor(blocks.reshape(num_rows, -1), tensor_type, (num_rows, num_columns))


def values(tensor: Tensor | StoredTensor) -> Tensor:
    return tensor.values() if isinstance(tensor, StoredTensor) else tensor.float()


def fused(tensors: list[Tensor | StoredTensor], biases: list[Tensor] | None, options: LayerOptions = OPTIONS) -> Linear:
    """Return a finished linear of these shards, filled from the last to the first."""
    names = "abcdef"[: len(tensors)]
    shards = [Shard(name, tensor.shape[0]) for name, tensor in zip(names, tensors, strict=True)]
    linear = Linear(tensors[0].shape[1], shards, bias=biases is not None, options=options)
    slots = {slot.name: slot for slot in linear.slots("")}
    for index in reversed(range(len(tensors))):
        slots[f"{names[index]}.weight"].fill(tensors[index])
        if biases is not None:
            slots[f"{names[index]}.bias"].fill(biases[index])
    linear.finish()
    return linear


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_shards_of_different_formats_write_their_columns(with_bias: bool) -> None:
    tensors: list[Tensor | StoredTensor] = [
        stored(TensorType.Q4_1, 40, 64),
        stored(TensorType.Q4_1, 33, 64, seed=1),
        stored(TensorType.Q8_0, 7, 64, seed=2),
        torch.randn(5, 64, dtype=torch.float64),
        torch.randn(9, 64).bfloat16(),
        stored(TensorType.Q4_0, 32, 64, seed=3),
    ]
    biases = [torch.randn(tensor.shape[0]) for tensor in tensors] if with_bias else None
    linear = fused(tensors, biases)
    x = torch.randn(7, 64)
    expected = torch.cat([x @ values(tensor).T for tensor in tensors], dim=-1)
    if biases is not None:
        expected += torch.cat(biases)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    parts = linear.parameters.parts
    assert [(part.weight.format, part.columns.start, part.columns.stop) for part in parts] == [
        (WeightFormat.Q4_1, 0, 73),
        (WeightFormat.Q8_0, 73, 80),
        (WeightFormat.F32, 80, 85),
        (WeightFormat.BF16, 85, 94),
        (WeightFormat.Q4_0, 94, 126),
    ]


@pytest.mark.parametrize("tensor_type", [*PLANE_TYPES, *PART_TYPES], ids=lambda item: item.name)
def test_types_with_planes_stay_packed(tensor_type: TensorType) -> None:
    """Beside another type, in its own columns; what is held takes the file's bytes within 5 %."""
    tensors = [stored(tensor_type, 64, 512), stored(TensorType.Q8_0, 32, 512)]
    linear = fused([*tensors], None)
    part = linear.parameters.parts[0]
    assert part.weight.format.name == tensor_type.name
    assert part.weight.num_bytes <= 1.05 * tensors[0].rows.nbytes
    x = torch.randn(7, 512)
    expected = torch.cat([x @ values(tensor).T for tensor in tensors], dim=-1)
    assert (linear(x) - expected).norm() <= 1e-5 * expected.norm()


def test_every_block_type_has_a_product() -> None:
    every = {item for item in TensorType if item.block_elements > 1}
    assert every == set(BLOCK_FORMATS) == {*BLOCK_TYPES, *PLANE_TYPES, *PART_TYPES}


def test_whole_numbers_are_expanded_exactly() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (32, 64), dtype=np.uint8)
    tensor = StoredTensor(raw, TensorType.I16, (32, 32))
    (part,) = fused([tensor], None).parameters.parts
    assert part.weight.format is WeightFormat.F32
    assert torch.equal(unpack_weight(part.weight), tensor.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_weights_keep_their_own_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(33, 50).to(dtype)
    linear = fused([weight], None)
    (part,) = linear.parameters.parts
    assert part.weight.format.dtype == dtype
    x = torch.randn(3, 50)
    torch.testing.assert_close(linear(x), x @ weight.float().T, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_file_is_kept_when_a_matrix_is_finished() -> None:
    linear = fused([stored(TensorType.Q8_0, 8, 32)], None)
    assert linear.parameters.stored == {}
    assert linear.parameters.parts[0].weight.num_bytes == 32 * 32 + 64


@pytest.mark.parametrize("tensor_type", [*BLOCK_TYPES, *PLANE_TYPES, *PART_TYPES], ids=lambda item: item.name)
def test_8_bit_activations_are_for_block_formats_alone(tensor_type: TensorType) -> None:
    torch.manual_seed(0)  # a norm of few outputs may be small by chance
    options = LayerOptions(quant=Packed(int8_activations=True))
    dense, blocks = torch.randn(8, 256), stored(tensor_type, 8, 256)
    x = torch.randn(3, 256)
    rounded = fused([dense, blocks], None, options)(x)
    exact = fused([dense, blocks], None)(x)
    assert torch.equal(rounded[:, :8], exact[:, :8])
    assert not torch.equal(rounded[:, 8:], exact[:, 8:])
    assert (rounded - exact).norm() < 0.01 * exact.norm()


def generate(source: GGUFSource, quant: QuantMethod[Any]) -> tuple[Tensor, dict[int, list[int]]]:
    model = load_model(source, quant=quant)
    assert isinstance(model, Llama)
    logits: list[Tensor] = []
    driver = Driver(make_runner(model, watch=lambda _, hidden: logits.append(model.logits(hidden))))
    driver.add(0, [5, 6, 7, 200, 9])
    driver.add(1, [17])
    tokens = driver.generate(6)
    return torch.cat(logits), tokens


def quantised(gguf: Any, tensor_type: TensorType) -> Iterator[tuple[str, tuple[int, np.ndarray]]]:
    """Yield the tiny model's matrices, random and quantised by the gguf package."""
    rng = np.random.default_rng(3)
    shapes = {
        "token_embd": (273, 64),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    for name, shape in shapes.items():
        matrix = rng.standard_normal(shape, np.float32) / 8
        yield f"{name}.weight", (int(tensor_type), gguf.quantize(matrix, gguf.GGMLQuantizationType(int(tensor_type))))


@pytest.mark.parametrize("tensor_type", [*BLOCK_TYPES, TensorType.Q5_0, TensorType.Q5_1], ids=lambda item: item.name)
def test_a_quantised_model_has_the_logits_of_the_expanded_one(make_gguf: MakeGGUF, tensor_type: TensorType) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package quantises")
    source = GGUFSource(make_gguf(tensors=dict(quantised(gguf, tensor_type))))
    packed, packed_tokens = generate(source, Packed())
    expanded, expanded_tokens = generate(source, Unquantized())
    assert (packed - expanded).norm() <= 1e-5 * expanded.norm()
    assert packed_tokens == expanded_tokens


@pytest.mark.parametrize(
    "tensor_type", [*BLOCK_TYPES, *PLANE_TYPES, None], ids=lambda item: item.name if item else "F32"
)
@pytest.mark.parametrize("quant", [Packed(), Packed(int8_activations=True)], ids=["exact", "fast"])
def test_a_head_draws_what_its_logits_give(quant: Packed, tensor_type: TensorType | None) -> None:
    options = LayerOptions(quant=quant)
    embedding = Embedding(300, 2048, options=options)
    embedding.parameters.stored[0] = torch.randn(300, 2048) if tensor_type is None else stored(tensor_type, 300, 2048)
    embedding.finish()
    head = LMHead(embedding, tied=True, options=options)
    head.finish()
    without_norms = (None, TensorType.Q4_1, TensorType.Q5_1, TensorType.Q2_K, TensorType.Q4_K, TensorType.Q5_K)
    assert (head.parameters.norms is not None) == (tensor_type not in without_norms and not quant.int8_activations)
    hidden, index = torch.randn(40, 2048), torch.arange(40)
    logits = head(hidden)
    token_ids, best = head.greedy(hidden)
    assert token_ids.tolist() == logits.argmax(dim=-1).tolist()
    assert torch.equal(best, logits.amax(dim=-1))
    noise = {"seeds": index, "sequence_index": index % 3, "positions": index}
    drawn = head.draw(hidden, temperature=torch.ones(40), source_rows=None, **noise)
    expected = sample_tokens(logits, torch.ones(40), **noise)
    assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))


def test_a_head_of_small_rows_has_no_norms() -> None:
    embedding = Embedding(300, 256, options=OPTIONS)
    embedding.parameters.stored[0] = stored(TensorType.Q4_0, 300, 256)
    embedding.finish()
    head = LMHead(embedding, tied=True, options=OPTIONS)
    head.finish()
    assert head.parameters.norms is None


@pytest.mark.parametrize("tensor_type", [*PLANE_TYPES, *PART_TYPES], ids=lambda item: item.name)
def test_a_model_with_planes_has_the_logits_of_the_expanded_one(make_gguf: MakeGGUF, tensor_type: TensorType) -> None:
    """Hidden size 256, so that K types divide every matrix; the embedding and the head are of the type too."""
    wide = {"llama.embedding_length": 256, "llama.feed_forward_length": 256, "llama.attention.head_count": 8}
    rows = {"token_embd": 273, "blk.0.attn_q": 256, "blk.0.attn_k": 32, "blk.0.attn_v": 32, "blk.0.attn_output": 256}
    rows |= {"blk.0.ffn_gate": 256, "blk.0.ffn_up": 256, "blk.0.ffn_down": 256}
    tensors = {
        f"{name}.weight": (int(tensor_type), stored(tensor_type, count, 256, seed).rows)
        for seed, (name, count) in enumerate(rows.items())
    }
    norm = (int(TensorType.F32), np.full(256, 0.1, np.float32).view(np.uint8))
    tensors |= dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"), norm)
    source = GGUFSource(make_gguf(wide, tensors))
    packed, packed_tokens = generate(source, Packed())
    expanded, expanded_tokens = generate(source, Unquantized())
    assert (packed - expanded).norm() <= 1e-5 * expanded.norm()
    assert packed_tokens == expanded_tokens


def test_a_file_of_every_type_has_the_logits_of_the_expanded_one(make_gguf: MakeGGUF) -> None:
    source = GGUFSource(make_gguf())
    packed, _ = generate(source, Packed())
    expanded, _ = generate(source, Unquantized())
    assert (packed - expanded).norm() <= 1e-5 * expanded.norm()


def test_the_method_is_chosen_by_what_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(choose, "cpu_isa", lambda: "avx2")
    assert isinstance(choose.choose_method(cpu, torch.float32), Packed)
    assert isinstance(choose.choose_method(cpu, torch.bfloat16), Unquantized)
    assert isinstance(choose.choose_method(torch.device("cuda"), torch.float32), Unquantized)
    monkeypatch.setattr(choose, "cpu_isa", lambda: "none")
    assert isinstance(choose.choose_method(cpu, torch.float32), Unquantized)


def test_an_instruction_set_that_cannot_be_had_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise BackendUnavailable("OCTAVO_CPU_ISA=avx512: this machine runs avx2 at most")

    monkeypatch.setattr(choose, "cpu_isa", refuse)
    with pytest.raises(InvalidConfig, match="OCTAVO_CPU_ISA=avx512: this machine runs avx2 at most"):
        choose.choose_method(torch.device("cpu"), torch.float32)


def test_slots_name_the_shape_that_they_want() -> None:
    linear = Linear(64, [Shard("a", 3), Shard("b", 5)], bias=True, options=OPTIONS)
    slots: list[WeightSlot] = list(linear.slots("x."))
    assert [(slot.name, slot.shape) for slot in slots] == [
        ("x.a.weight", (3, 64)),
        ("x.a.bias", (3,)),
        ("x.b.weight", (5, 64)),
        ("x.b.bias", (5,)),
    ]
    assert sum(slot.num_parameters for slot in slots) == 8 * 64 + 8
