"""Checkpoints that we quantise: their layouts against NumPy, read back by our loader and computed by Transformers."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from safetensors.torch import load_file

from octavo_engine import LLM, SamplingParams
from octavo_engine.errors import InvalidConfig, UnsupportedModel
from octavo_engine.quant.calibrate.folder import FolderWriter
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.perplexity import perplexity
from octavo_engine.quant.calibrate.quantize import quantize_checkpoint
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource, GGUFSource

SEQUENCES = [[(11 * i + 7 * j * j) % 131 for i in range(32)] for j in range(8)]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Take the streams of bits along the first dimension apart, bit by bit."""
    stream = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    fields = stream.reshape(-1, bits, words.shape[1])
    return (fields << np.arange(bits)[None, :, None]).sum(axis=1)


def gptq_values(parts: dict[str, np.ndarray], bits: int) -> np.ndarray:
    codes = unpacked(parts["qweight"], bits)
    zeros = (unpacked(parts["qzeros"].T.copy(), bits).T + 1) % 2**bits
    groups = parts["g_idx"]
    return (parts["scales"].astype(np.float32)[groups] * (codes - zeros[groups]).astype(np.float32)).T


def awq_values(parts: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    def outputs(words: np.ndarray) -> np.ndarray:
        fields = (words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
        return fields[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1).astype(np.int64)

    codes, zeros = outputs(parts["qweight"]), outputs(parts["qzeros"])
    groups = np.arange(len(codes)) // group_size
    return (parts["scales"].astype(np.float32)[groups] * (codes - zeros[groups]).astype(np.float32)).T


OPTIONS = {
    "gptq": QuantizeOptions(group_size=16),
    "gptq, symmetric": QuantizeOptions(symmetric=True),
    "gptq, act_order": QuantizeOptions(group_size=16, act_order=True),
    "gptq, 8 bits, one group": QuantizeOptions(bits=8, group_size=None),
    "gptq, 2 bits": QuantizeOptions(bits=2, group_size=16),
    "rtn": QuantizeOptions(method="rtn"),
    "awq": QuantizeOptions(method="awq", group_size=16),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_written_checkpoint_is_read_bit_for_bit_and_computes_as_transformers(
    options: QuantizeOptions, tiny_llama: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, oracle = tiny_llama[0], copy.deepcopy(tiny_llama[1])
    out = tmp_path / "out"
    written = quantize_checkpoint(FolderSource(folder), SEQUENCES, out, options)
    assert written.num_linears == 14
    stored = load_file(out / "model.safetensors")
    assert written.num_bytes == (out / "model.safetensors").stat().st_size
    source = FolderSource(out)
    read = dict(source.weights())
    for name, module in oracle.named_modules():
        if name.endswith("_proj"):
            parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}.")}
            arrays = {part: value.numpy() for part, value in parts.items()}
            size = options.group_size or module.in_features
            values = awq_values(arrays, size) if options.method == "awq" else gptq_values(arrays, options.bits)
            assert np.array_equal(read[f"{name}.weight"].values().numpy(), values), name
            module.weight.data = torch.from_numpy(values)
    own = {name: value.float() for name, value in stored.items() if name.endswith((".weight", ".bias"))}
    oracle.load_state_dict(own, strict=False)
    with torch.inference_mode():
        loss = oracle(torch.tensor(SEQUENCES), labels=torch.tensor(SEQUENCES)).loss
    assert perplexity(load_model(source), SEQUENCES) == pytest.approx(float(loss.exp()), rel=1e-4)


def test_awq_takes_scales_back_so_that_the_model_stays_what_it_is(tiny_llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tiny_llama[0]
    before = perplexity(load_model(FolderSource(folder)), SEQUENCES)
    found = {}
    for method in ("awq", "rtn"):
        out = tmp_path / method
        quantize_checkpoint(FolderSource(folder), SEQUENCES, out, QuantizeOptions(method=method, group_size=16))
        found[method] = perplexity(load_model(FolderSource(out)), SEQUENCES)
    norms = {key: value for key, value in load_file(tmp_path / "awq" / "model.safetensors").items() if "norm" in key}
    plain = load_file(tmp_path / "rtn" / "model.safetensors")
    changed = sorted(key for key, value in norms.items() if not torch.equal(value, plain[key]))
    assert changed  # scales were folded into norms
    assert all(key.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")) for key in changed)
    assert found["awq"] == pytest.approx(before, rel=0.1)


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tiny_model_path: Path, tmp_path: Path) -> None:
    source, out = GGUFSource(tiny_model_path), tmp_path / "out"
    quantize_checkpoint(source, [], out, QuantizeOptions(method="rtn", bits=8))
    made = FolderSource(out)
    assert made.config.rope == source.config.rope
    assert made.config.eos_token_ids == source.config.eos_token_ids
    assert made.tokenizer().special_tokens == source.tokenizer().special_tokens
    for text in ("hello world 123", "<|im_start|>x<think>\n\n", "né 多"):
        assert made.tokenizer().encode(text) == source.tokenizer().encode(text)
        ids = source.tokenizer().encode(text)
        assert made.tokenizer().decode(ids) == source.tokenizer().decode(ids)
    messages = [{"role": "user", "content": "hello"}]
    templates = [item.chat_template() for item in (made, source)]
    assert templates[0].render(messages) == templates[1].render(messages)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = LLM(str(out), show_progress=False, num_blocks=8).generate("hello hello", params)
    assert len(outputs[0].outputs[0].token_ids) == 4


def test_what_cannot_be_quantised_is_refused_and_leaves_nothing(
    tiny_llama: tuple[Path, Any], make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = FolderSource(tiny_llama[0]), tmp_path / "out"
    with pytest.raises(InvalidConfig, match="method 'gptq' needs text"):
        quantize_checkpoint(source, [], out, QuantizeOptions())
    with pytest.raises(UnsupportedModel, match="group_size 48 does not divide 64 inputs"):
        quantize_checkpoint(source, SEQUENCES, out, QuantizeOptions(method="awq", group_size=48))
    factors = make_gguf(tensors={"rope_freqs.weight": (0, np.ones(16, np.float32).view(np.uint8))})
    with pytest.raises(UnsupportedModel, match=r"'rope_freqs.weight' has no form in config.json"):
        quantize_checkpoint(GGUFSource(factors), [], out, QuantizeOptions(method="rtn"))
    assert not out.exists()
    quantize_checkpoint(source, [], out, QuantizeOptions(method="rtn"))
    with pytest.raises(UnsupportedModel, match="this checkpoint is quantised"):
        quantize_checkpoint(FolderSource(out), [], tmp_path / "again", QuantizeOptions(method="rtn"))
    with pytest.raises(InvalidConfig, match="expected a new or an empty folder"):
        quantize_checkpoint(source, [], out, QuantizeOptions(method="rtn"))


def test_weights_that_fill_several_files_have_an_index(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", bytes_of_file=100)
    for index in range(5):
        writer.add(f"w{index}", torch.full((10,), float(index)))
    writer.finish()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    parts = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    assert names == [*parts, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 200
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "out" / file)[name].tolist() == [float(name[1])] * 10
