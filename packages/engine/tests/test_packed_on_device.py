"""Blocks that stay packed where Triton multiplies them: its interpreter stands for a GPU, other backends run too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.llama import Llama
from octavo_engine.numerics import resolve_numerics
from octavo_engine.quant import choose
from octavo_engine.quant.base import QuantMethod, Shard
from octavo_engine.quant.packed_on_device import DeviceParameters, PackedOnDevice
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.testing import Driver, make_runner
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import Backend, PackedWeight, WeightFormat

pytestmark = pytest.mark.filterwarnings("default::octavo_kernels.BackendFallbackWarning")

MakeGGUF = Callable[..., Path]
CPU = torch.device("cpu")
PROMPTS = [5, 6, 7, 200, 9], [17]
NUM_TOKENS = 3
TYPES = {  # of the tiny model: four block types, two dense ones, one that no product reads, two in one linear
    "token_embd": ((273, 64), TensorType.Q8_0),
    "blk.0.attn_q": ((64, 64), TensorType.Q4_1),
    "blk.0.attn_k": ((32, 64), TensorType.Q4_0),
    "blk.0.attn_v": ((32, 64), TensorType.F16),
    "blk.0.attn_output": ((64, 64), TensorType.BF16),
    "blk.0.ffn_gate": ((96, 64), TensorType.Q5_1),
    "blk.0.ffn_up": ((96, 64), TensorType.Q5_1),
    "blk.0.ffn_down": ((64, 96), TensorType.MXFP4),
}


def blocks(shape: tuple[int, int], tensor_type: TensorType, seed: int = 0) -> Any:
    """Return random values as the gguf package quantises them: [rows, bytes per row] uint8."""
    gguf = pytest.importorskip("gguf", reason="the gguf package quantises")
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) / 8
    made = gguf.quantize(values, gguf.GGMLQuantizationType(int(tensor_type)))
    return np.ascontiguousarray(made).view(np.uint8)


def stored(tensor_type: TensorType, num_rows: int, num_columns: int, seed: int = 0) -> StoredTensor:
    return StoredTensor(blocks((num_rows, num_columns), tensor_type, seed), tensor_type, (num_rows, num_columns))


@pytest.fixture
def source(make_gguf: MakeGGUF) -> GGUFSource:
    """A tiny model of many types."""
    made = {name: (int(kind), blocks(shape, kind, seed)) for seed, (name, (shape, kind)) in enumerate(TYPES.items())}
    return GGUFSource(make_gguf(tensors={f"{name}.weight": tensor for name, tensor in made.items()}))


def load(source: GGUFSource, dtype: torch.dtype, quant: QuantMethod[Any], device: str = "cpu") -> Llama:
    model = load_model(source, device=device, dtype=dtype, quant=quant)
    assert isinstance(model, Llama)
    return model


def generate(model: Llama) -> list[list[int]]:
    driver = Driver(make_runner(model, kv_dtype=model.norm.weight.dtype))
    for row, prompt in enumerate(PROMPTS):
        driver.add(row, prompt)
    return list(driver.generate(NUM_TOKENS).values())


def reference_logits(source: GGUFSource, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the logits that each token of some answers was drawn from, of expanded weights in the reference."""
    with monkeypatch.context() as patched:
        patched.setenv("OCTAVO_BACKEND", "reference")
        model = load(source, torch.float32, Unquantized())
        found: list[Tensor] = []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            driver = Driver(make_runner(model, watch=lambda _, hidden: found.append(model.logits(hidden))))
            driver.add(0, (*prompt, *answer))
            driver.generate(1)
    return [logits[len(prompt) - 1 : -1] for logits, prompt in zip(found, PROMPTS, strict=True)]


@pytest.mark.parametrize(("dtype", "tie"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_tokens_are_the_likeliest_of_the_reference_or_tie(
    source: GGUFSource, monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, tie: float
) -> None:
    """`tie` is a share of the largest logit: what rounding activations to the dtype leaves open."""
    answers = generate(load(source, dtype, PackedOnDevice(), device))
    num_gaps = 0
    for logits, answer in zip(reference_logits(source, answers, monkeypatch), answers, strict=True):
        gaps = logits.amax(dim=-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert gaps.max() <= tie * logits.abs().max()
        num_gaps += int((gaps > 0).sum())
    assert num_gaps <= 1


def test_memory_is_that_of_the_file_but_for_what_is_expanded(source: GGUFSource) -> None:
    model = load(source, torch.bfloat16, PackedOnDevice())
    matrices = {name: linear.parameters for name, linear in named_matrices(model)}
    sizes = {name: parameters.num_bytes for name, parameters in matrices.items()}
    in_file = {
        name: shape[0] * shape[1] * kind.block_bytes // kind.block_elements for name, (shape, kind) in TYPES.items()
    }
    q_k, gate_up = in_file["blk.0.attn_q"] + in_file["blk.0.attn_k"], 2 * in_file["blk.0.ffn_gate"]
    assert sizes["qkv"] == q_k + 32 * 64 * 2  # v is dense
    assert sizes["gate_up"] == gate_up
    assert sizes["out"] == 64 * 64 * 2
    assert sizes["down"] == 64 * 96 * 2
    assert sizes["embedding"] == -(-273 // 32) * 32 * (64 // 32) * 34  # whole panels of 32 rows
    assert all(not parameters.stored for parameters in matrices.values())


def named_matrices(model: Llama) -> list[tuple[str, Any]]:
    (layer,) = model.layers
    attention, mlp = layer.attention, layer.mlp
    return [
        ("embedding", model.embedding),
        ("qkv", attention.qkv),
        ("out", attention.out),
        ("gate_up", mlp.gate_up),
        ("down", mlp.down),
    ]


def test_a_matrix_without_blocks_is_torchs_own(source: GGUFSource) -> None:
    """Bit for bit, bias included: what is not quantised is served as without this method."""
    options = [LayerOptions(dtype=torch.bfloat16, quant=quant) for quant in (PackedOnDevice(), Unquantized())]
    ours, theirs = (Linear(64, [Shard("a", 5), Shard("b", 7)], bias=True, options=option) for option in options)
    generator = torch.Generator().manual_seed(0)
    for own, other in zip(ours.slots(""), theirs.slots(""), strict=True):
        assert (own.name, own.shape) == (other.name, other.shape)
        tensor = torch.randn(own.shape, generator=generator)
        own.fill(tensor)
        other.fill(tensor)
    ours.finish()
    theirs.finish()
    x = torch.randn(3, 64, generator=generator).bfloat16()
    assert torch.equal(ours(x), theirs(x))
    assert ours.bias is not None
    assert theirs.bias is not None
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_shards_of_many_kinds_write_their_columns(dtype: torch.dtype, device: str) -> None:
    """Neighbours of one type are one weight, but not across dense rows; filled from the last to the first."""
    torch.manual_seed(0)
    tensors: list[Tensor | StoredTensor] = [
        torch.randn(9, 64, dtype=torch.float64),
        stored(TensorType.Q4_1, 40, 64),
        stored(TensorType.Q4_1, 33, 64, seed=1),
        torch.randn(5, 64).bfloat16(),
        stored(TensorType.Q4_1, 7, 64, seed=2),
        stored(TensorType.Q8_0, 32, 64, seed=3),
        stored(TensorType.MXFP4, 3, 64, seed=4),
    ]
    shards = [Shard(f"{index}", tensor.shape[0]) for index, tensor in enumerate(tensors)]
    options = LayerOptions(dtype=dtype, device=torch.device(device), quant=PackedOnDevice())
    linear = Linear(64, shards, bias=True, options=options)
    biases = [torch.randn(shard.num_rows) for shard in shards]
    slots = {slot.name: slot for slot in linear.slots("")}
    for index in reversed(range(len(tensors))):
        slots[f"{index}.weight"].fill(tensors[index])
        slots[f"{index}.bias"].fill(biases[index])
    linear.finish()
    parts = linear.parameters.parts
    kinds = [part.weight.format if isinstance(part.weight, PackedWeight) else part.weight.dtype for part in parts]
    assert list(zip(kinds, [(part.columns.start, part.columns.stop) for part in parts], strict=True)) == [
        (dtype, (0, 9)),
        (WeightFormat.Q4_1, (9, 82)),
        (dtype, (82, 87)),
        (WeightFormat.Q4_1, (87, 94)),
        (WeightFormat.Q8_0, (94, 126)),
        (dtype, (126, 129)),
    ]
    dense = [part.weight for part in parts if isinstance(part.weight, Tensor)]
    assert [weight.untyped_storage().nbytes() for weight in dense] == [weight.nbytes for weight in dense]
    x = torch.randn(7, 64).to(dtype)
    values = [tensor.values() if isinstance(tensor, StoredTensor) else tensor for tensor in tensors]
    expected = x.double() @ torch.cat([value.double() for value in values]).T + torch.cat(biases).double()
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
    for part in parts:
        error = linear(x.to(device))[:, part.columns].double().cpu() - expected[:, part.columns]
        assert error.norm() <= tolerance * expected[:, part.columns].norm()
    assert linear.bias is not None
    assert torch.equal(linear.bias.cpu(), torch.cat(biases))


def test_a_tied_table_is_one_weight(make_gguf: MakeGGUF) -> None:
    for kind in (TensorType.Q8_0, TensorType.F16):
        tensor = (int(kind), blocks((273, 64), kind))
        path = make_gguf(tensors={"token_embd.weight": tensor, "output.weight": None}, name=f"{kind.name}.gguf")
        model = load(GGUFSource(path), torch.bfloat16, PackedOnDevice())
        table, head = model.embedding.parameters, model.head.parameters
        assert isinstance(table, DeviceParameters)
        assert table.num_bytes == head.num_bytes
        if kind is TensorType.Q8_0:
            assert head.parts[0].weight is table.parts[0].weight
        else:
            assert head.dense.weight is table.dense.weight


def test_it_is_chosen_where_triton_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "choose", lambda _op, device: Backend.TRITON if device.type == "cuda" else Backend.CPU)
    gpu = torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert isinstance(choose.choose_method(gpu, dtype), PackedOnDevice)
        assert choose.holds_blocks(gpu, dtype)
    assert isinstance(choose.choose_method(CPU, torch.bfloat16), Unquantized)
    assert not choose.holds_blocks(CPU, torch.bfloat16)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the session triton-interpreter")
def test_it_is_chosen_in_the_interpreter() -> None:
    assert isinstance(choose.choose_method(CPU, torch.bfloat16), PackedOnDevice)


def test_a_backend_that_cannot_run_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InvalidConfig, match="OCTAVO_BACKEND=triton: "):
        choose.choose_method(CPU, torch.bfloat16)


def test_online_quantisation_is_had_on_a_gpu_too(source: GGUFSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(quantization="int8", dtype="bfloat16", device="cpu")
    monkeypatch.setattr(choose, "has_triton_products", lambda _: False)
    with pytest.raises(InvalidConfig, match="or Triton on a GPU; device is cpu and dtype bfloat16"):
        resolve_numerics(config, source.config)
    monkeypatch.setattr(choose, "has_triton_products", lambda _: True)
    assert resolve_numerics(config, source.config).quantization == "int8"
