"""Mixtral out of GGUF files that the gguf library writes: experts stacked, fused, one by one, in several types."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")
gguf = pytest.importorskip("gguf", reason="gguf writes the files")

import torch

from octavo_engine.errors import CorruptModelFile, UnsupportedModel
from octavo_engine.models.mixtral import Mixtral
from octavo_engine.quant.choose import has_native_products
from octavo_engine.testing import Driver, make_runner
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource, open_source
from octavo_engine.weights.stored import StoredTensor

Tensors = dict[str, np.ndarray[Any, Any]]
Made = tuple[Path, Any]
PROMPTS = [[3, 14, 15, 92, 65], list(range(40, 77))]
TYPES = gguf.GGMLQuantizationType
PLACES = {"gate": "w1", "up": "w3", "down": "w2"}


def tensors_of(model: Any) -> Tensors:
    """The weights of a Transformers model under GGUF's names, experts in stacks, rotary rows in pairs."""
    config, state = model.config, {name: weight.numpy() for name, weight in model.state_dict().items()}
    named = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"],
        "output": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        own, block = f"model.layers.{layer}.", f"blk.{layer}."
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for kind in "qkv":
            rows = state[f"{own}self_attn.{kind}_proj.weight"]
            if kind in heads:
                rows = rows.reshape(heads[kind], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
            named[f"{block}attn_{kind}"] = rows
        named[f"{block}attn_output"] = state[f"{own}self_attn.o_proj.weight"]
        named[f"{block}attn_norm"] = state[f"{own}input_layernorm.weight"]
        named[f"{block}ffn_norm"] = state[f"{own}post_attention_layernorm.weight"]
        named[f"{block}ffn_gate_inp"] = state[f"{own}mlp.gate.weight"]
        gate, up = np.split(state[f"{own}mlp.experts.gate_up_proj"], 2, axis=1)
        down = state[f"{own}mlp.experts.down_proj"]
        named |= {f"{block}ffn_gate_exps": gate, f"{block}ffn_up_exps": up, f"{block}ffn_down_exps": down}
    return {f"{name}.weight": np.ascontiguousarray(values) for name, values in named.items()}


def write(path: Path, model: Any, tensors: Tensors, expert_type: Any = TYPES.F32, **metadata: int) -> Path:
    """Write a file without a tokenizer: experts in `expert_type`, all else in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    counts = {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok, **metadata}
    for key, value in counts.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, values in tensors.items():
        if "_exps" in name and expert_type != TYPES.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, expert_type), raw_dtype=expert_type)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fused(tensors: Tensors) -> Tensors:
    """Gate and up of all experts in one tensor, gate first."""
    changed = dict(tensors)
    for name in tensors:
        if "ffn_gate_exps" in name:
            both = [changed.pop(name), changed.pop(name.replace("gate", "up"))]
            changed[name.replace("gate", "gate_up")] = np.concatenate(both, axis=1)
    return changed


def one_by_one(tensors: Tensors) -> Tensors:
    """Each expert in tensors of its own, as files were written until 2024."""
    changed: Tensors = {}
    for name, values in tensors.items():
        experts = {name.replace("_exps", f".{i}"): expert for i, expert in enumerate(values)}
        changed |= experts if "_exps" in name else {name: values}
    return changed


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {"stacked": dict, "fused": fused, "one by one": one_by_one}


def check_greedy(path: Path, model: Any, num_tokens: int = 8) -> None:
    loaded = load_model(GGUFSource(path))
    assert isinstance(loaded, Mixtral)
    for prompt in PROMPTS:
        driver = Driver(make_runner(loaded))
        driver.add(0, prompt)
        with torch.inference_mode():
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
        assert driver.generate(num_tokens)[0] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_holds_the_published_weights(
    tiny_mixtral: Made, tmp_path: Path, layout: Callable[[Tensors], Tensors]
) -> None:
    folder, model = tiny_mixtral
    source = GGUFSource(write(tmp_path / "m.gguf", model, layout(tensors_of(model))))
    assert source.config.architecture == "MixtralForCausalLM"
    found, expected = dict(source.weights()), dict(open_source(folder).weights())
    assert found.keys() == expected.keys()
    assert source.num_weights == len(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    check_greedy(source.path, model)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_experts_stay_packed_and_mean_what_gguf_says(
    make_mixtral: Callable[..., Made], tmp_path: Path, kind: str
) -> None:
    """Each expert's blocks are the file's own; tokens are those of Transformers with the values that they mean."""
    model = make_mixtral(num_local_experts=3)[1]
    expert_type = TYPES[kind]
    tensors = tensors_of(model)
    path = write(tmp_path / "m.gguf", model, tensors, expert_type)
    weights = dict(GGUFSource(path).weights())
    for name, values in tensors.items():
        if "_exps" not in name:
            continue
        stored = gguf.quants.quantize(values, expert_type)
        meant = torch.from_numpy(gguf.quants.dequantize(stored, expert_type).reshape(values.shape).copy())
        layer, place = int(name.split(".")[1]), PLACES[name.split("_")[1]]
        for expert in range(3):
            read = weights[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{place}.weight"]
            if isinstance(read, StoredTensor):
                assert read.type == TensorType[kind]
                assert np.array_equal(read.rows, stored[expert].view(np.uint8))
                read = read.values()
            assert torch.equal(read.float(), meant[expert])
        experts = model.model.layers[layer].mlp.experts
        half = experts.gate_up_proj.shape[1] // 2
        target = {
            "w1": experts.gate_up_proj[:, :half],
            "w3": experts.gate_up_proj[:, half:],
            "w2": experts.down_proj,
        }[place]
        target.data.copy_(meant)
    check_greedy(path, model)
    if has_native_products(torch.device("cpu")):
        block = load_model(GGUFSource(path)).layers[0].mlp.experts.blocks[1]  # type: ignore[attr-defined]
        (part,) = block.down.parameters.parts
        assert part.weight.format.value == kind.lower()


def test_parts_of_packed_experts_are_read(tiny_mixtral: Made, tmp_path: Path) -> None:
    source = GGUFSource(write(tmp_path / "m.gguf", tiny_mixtral[1], tensors_of(tiny_mixtral[1]), TYPES.Q8_0))
    stem = "model.layers.1.block_sparse_moe.experts.2"
    cuts = {f"{stem}.w1.weight": Cut(0, 48, 96, 96), f"{stem}.w2.weight": Cut(1, 32, 64, 96)}
    cuts[f"{stem}.w3.weight"] = Cut(0, 0, 48, 96)
    assert source.column_block(f"{stem}.w2.weight") == 32
    whole, parts = dict(source.weights()), dict(source.weights(cuts.get))
    rest = dict(source.weights(keep=lambda name: stem not in name))
    assert rest.keys() == {name for name in whole if stem not in name}
    for name, cut in cuts.items():
        expected = whole[name].values()
        expected = expected[cut.span] if cut.axis == 0 else expected[:, cut.span]
        assert tuple(parts[name].shape) == tuple(expected.shape)
        assert torch.equal(parts[name].values(), expected)


def test_a_stack_of_other_experts_is_corrupt(tiny_mixtral: Made, tmp_path: Path) -> None:
    tensors = tensors_of(tiny_mixtral[1])
    with pytest.raises(CorruptModelFile, match=r"ffn_\w+_exps.weight': expected shape \[5 experts, .*found \[4, "):
        GGUFSource(write(tmp_path / "5.gguf", tiny_mixtral[1], tensors, expert_count=5))
    with pytest.raises(UnsupportedModel, match=r"ffn_\w+_exps.weight' is none of the llama architecture's"):
        GGUFSource(write(tmp_path / "0.gguf", tiny_mixtral[1], tensors, expert_count=0))


def test_an_expert_that_is_stored_twice_is_corrupt(tiny_mixtral: Made, tmp_path: Path) -> None:
    tensors = tensors_of(tiny_mixtral[1])
    extra = {"blk.1.ffn_up.2.weight": tensors["blk.1.ffn_up_exps.weight"][2]}
    with pytest.raises(CorruptModelFile, match=r"expected 'model.layers.1.*experts.2.w3.weight' once, found it twice"):
        GGUFSource(write(tmp_path / "m.gguf", tiny_mixtral[1], {**tensors, **extra}))
