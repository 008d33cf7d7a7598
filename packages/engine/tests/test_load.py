"""Loading: weights stream into their slots; what is missing, unexpected, repeated or misshapen is named."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile, UnsupportedModel
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama
from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.testing import random_weights, tiny_config
from octavo_engine.weights.load import load_model, load_weights


@dataclass
class MemorySource:
    config: ModelConfig
    tensors: list[tuple[str, Tensor]]
    name: str = "memory"
    is_quantized: bool = False
    read: list[str] = field(default_factory=list)

    @property
    def num_weights(self) -> int:
        return len(self.tensors)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            self.read.append(name)
            yield name, tensor


def source(*, tied: bool = False) -> MemorySource:
    config = tiny_config(tie_word_embeddings=tied)
    return MemorySource(config, list(random_weights(config).items()))


def filled(given: MemorySource) -> Llama:
    """Return the source's model with its weights in their slots, as they are before products are prepared."""
    model = Llama(given.config, LayerOptions())
    load_weights(model, given.weights(), where=given.name, num_weights=given.num_weights)
    return model


def test_every_tensor_is_read_once_and_lands_in_its_slot() -> None:
    given = source()
    given.tensors.reverse()
    model = filled(given)
    assert given.read == [name for name, _ in given.tensors]
    tensors = dict(given.tensors)
    assert {slot.name: slot.shape for slot in model.slots()} == {name: t.shape for name, t in tensors.items()}
    layer = model.layers[1]
    assert torch.equal(model.embedding.parameters.weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(model.head.parameters.weight, tensors["lm_head.weight"])
    assert torch.equal(model.norm.weight, tensors["model.norm.weight"])
    assert torch.equal(layer.attention_norm.weight, tensors["model.layers.1.input_layernorm.weight"])
    assert torch.equal(layer.mlp_norm.weight, tensors["model.layers.1.post_attention_layernorm.weight"])
    assert torch.equal(layer.attention.out.parameters.weight, tensors["model.layers.1.self_attn.o_proj.weight"])
    assert torch.equal(layer.mlp.down.parameters.weight, tensors["model.layers.1.mlp.down_proj.weight"])


def test_fused_weights_hold_their_shards_in_order() -> None:
    given = source()
    model = filled(given)
    tensors = dict(given.tensors)
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(model.layers[1].attention.qkv.parameters.weight, torch.cat(parts))
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(model.layers[0].mlp.gate_up.parameters.weight, torch.cat([gate, up]))


def test_weights_are_converted_to_the_dtype() -> None:
    model = load_model(source(), dtype=torch.bfloat16)
    assert isinstance(model, Llama)
    assert model.layers[0].attention.qkv.parameters.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == model.embedding.parameters.weight.dtype == torch.bfloat16


def test_progress_counts_to_the_total() -> None:
    given = source()
    seen: list[tuple[int, int]] = []
    load_model(given, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 21) for i in range(21)]


def test_missing_tensor_is_named_with_its_shape() -> None:
    given = source()
    given.tensors = [(n, t) for n, t in given.tensors if n != "model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CorruptModelFile) as error:
        load_model(given)
    assert str(error.value) == (
        "memory: expected tensor 'model.layers.1.mlp.up_proj.weight' of shape [48, 32], found none"
    )


def test_several_missing_tensors_are_counted() -> None:
    given = source()
    given.tensors = given.tensors[3:]
    with pytest.raises(CorruptModelFile, match=r"'model.embed_tokens.weight' of shape \[97, 32\], found none, nor 2 o"):
        load_model(given)


def test_unexpected_tensor_is_named() -> None:
    given = source()
    given.tensors.append(("model.layers.7.mlp.up_proj.weight", torch.zeros(48, 32)))
    with pytest.raises(CorruptModelFile, match=r"'model.layers.7.mlp.up_proj.weight' of shape \[48, 32\] has no place"):
        load_model(given)


def test_misshapen_tensor_names_expected_and_found() -> None:
    given = source()
    given.tensors[2] = (given.tensors[2][0], torch.zeros(32, 31))
    with pytest.raises(CorruptModelFile) as error:
        load_model(given)
    assert str(error.value) == (
        "memory: tensor 'model.layers.0.self_attn.q_proj.weight': expected shape [64, 32], found [32, 31]"
    )


def test_integer_tensor_is_refused() -> None:
    given = source()
    given.tensors[2] = (given.tensors[2][0], torch.zeros(64, 32, dtype=torch.int8))
    with pytest.raises(CorruptModelFile, match=r"q_proj.weight': expected a floating dtype, found torch.int8"):
        load_model(given)


def test_repeated_tensor_is_refused() -> None:
    given = source()
    given.tensors.append(given.tensors[0])
    with pytest.raises(CorruptModelFile, match=r"tensor 'model.embed_tokens.weight' once, found it twice"):
        load_model(given)


@pytest.mark.parametrize("head_is_in_the_file", [False, True], ids=["without head", "with head"])
def test_tied_head_uses_the_embedding(head_is_in_the_file: bool) -> None:
    given = source(tied=True)
    if head_is_in_the_file:
        given.tensors.append(("lm_head.weight", torch.zeros(97, 32)))
    model = filled(given)
    assert model.head.parameters is model.embedding.parameters
    assert torch.equal(model.head.parameters.weight, dict(given.tensors)["model.embed_tokens.weight"])


@pytest.mark.parametrize("quant", [Unquantized(), Packed()], ids=["unquantized", "packed"])
def test_a_loaded_model_computes_what_its_weights_say(quant: QuantMethod[Any]) -> None:
    given = source(tied=True)
    hidden = torch.randn(5, 32)
    with torch.inference_mode():
        logits = load_model(given, quant=quant).logits(hidden)
    torch.testing.assert_close(logits, hidden @ dict(given.tensors)["model.embed_tokens.weight"].T)


def test_rotary_tables_of_old_checkpoints_are_passed_over() -> None:
    given = source()
    given.tensors.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4)))
    load_model(given)


def test_unknown_architecture_lists_the_known_ones() -> None:
    given = source()
    given.config = replace(given.config, architecture="GPT2LMHeadModel")
    with pytest.raises(UnsupportedModel, match=r"'GPT2LMHeadModel' is not supported; these are: LlamaForCausalLM"):
        load_model(given)


def test_parameters_can_be_counted_without_memory() -> None:
    config = replace(tiny_config(), vocab_size=1 << 30)
    model = Llama(config, LayerOptions(device=torch.device("meta")))
    assert model.num_parameters == 2 * 32 * (1 << 30) + 2 * (6144 + 3 * 48 * 32 + 64) + 32
