"""Online quantisation: blocks equal to ggml's, a model that runs on them, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine import LLM, SamplingParams
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import CorruptModelFile, InvalidConfig, UnsupportedModel
from octavo_engine.numerics import resolve_numerics
from octavo_engine.quant.choose import native_isa
from octavo_engine.quant.online import quantize_online
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.scaled_floats import ScaledFloats
from octavo_engine.weights.source import FolderSource
from octavo_engine.weights.stored import StoredTensor

KINDS = {"int8": TensorType.Q8_0, "int4": TensorType.Q4_1}
needs_native = pytest.mark.skipif(native_isa() is None, reason="blocks are multiplied by the native kernels")


def rounded(weight: torch.Tensor, kind: str) -> StoredTensor:
    ((_, found),) = quantize_online([("a.weight", weight)], {"a.weight"}, kind, "model")
    assert isinstance(found, StoredTensor)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_ggml(kind: str, dtype: torch.dtype) -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle")
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3] = 0
    weight[4, :32] = 0.25
    weight[5, 32:64] = torch.arange(32) - 15.5  # halves
    found = rounded(weight, kind)
    expected = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[KINDS[kind].name])
    assert found.type is KINDS[kind]
    assert np.array_equal(found.rows, expected)
    assert found.rows.flags.c_contiguous


def test_other_weights_pass_as_they_are() -> None:
    weight = torch.ones(3, 5)
    assert next(quantize_online([("norm.weight", weight)], {"a.weight"}, "int8", "model"))[1] is weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_numbers_that_scales_do_not_hold_are_refused(value: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 7] = value
    with pytest.raises(CorruptModelFile, match=r"model: tensor 'a.weight': expected numbers up to 65504"):
        rounded(weight, "int4")


def test_inputs_in_broken_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"'a.weight' has 80; leave quantization out"):
        rounded(torch.ones(2, 80), "int8")


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="quantization 'int3' is not one of int8, int4, fp8"):
        EngineConfig(quantization="int3")


@needs_native
def test_what_is_quantised_already_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'model.layers.0.self_attn.q_proj.weight' is \(Q4_1\)"):
        build_engine(EngineConfig(model=str(tiny_model_path), quantization="int4", num_blocks=8))


@needs_native
def test_activations_in_16_bits_are_refused(wide_llama: tuple[Path, Any]) -> None:
    with pytest.raises(InvalidConfig, match="needs the native CPU kernels and float32"):
        build_engine(EngineConfig(model=str(wide_llama[0]), quantization="int8", dtype="bfloat16"))


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=needs_native) for kind in KINDS), "fp8"])
def test_tokens_are_those_of_the_rounded_weights(kind: str, wide_llama: tuple[Path, Any]) -> None:
    folder, oracle = wide_llama[0], copy.deepcopy(wide_llama[1])
    for name, module in oracle.named_modules():
        if name.endswith("_proj"):
            ((_, found),) = quantize_online([("a.weight", module.weight.data)], {"a.weight"}, kind, "model")
            module.weight.data = found.values()
    prompts = [[3, 14, 15, 92, 65], [1] * 20]
    llm = LLM(str(folder), quantization=kind, show_progress=False, num_blocks=32)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + tokens])).logits[0]
        assert tokens == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        assert len(tokens) == 6


@needs_native
def test_cached_blocks_of_rounded_weights_are_not_those_of_the_files(wide_llama: tuple[Path, Any]) -> None:
    configs = [EngineConfig(model=str(wide_llama[0]), quantization=kind, num_blocks=8) for kind in (None, *KINDS)]
    model_config = FolderSource(wide_llama[0]).config
    assert len({resolve_numerics(config, model_config).root for config in configs}) == 3
    roots = set()
    for config in configs[:2]:
        host = build_engine(config).engine.standby._host
        assert host is not None
        roots.add(host.weights.root)
    assert len(roots) == 2


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random Llama in bfloat16 whose linears have whole blocks of inputs, and Transformers' model of it."""
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    from tokenizers import Tokenizer, decoders, models

    sizes = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(9)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("wide")
    model.bfloat16().save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={chr(0x100 + i): i for i in range(131)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder, model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_the_nearest_code_of_a_rows_own_scale(dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7)[:, None]).to(
        dtype
    )
    weight[3] = 0
    ((_, found),) = quantize_online([("a.weight", weight)], {"a.weight"}, "fp8", "model")
    assert isinstance(found, ScaledFloats)
    assert (found.codes.dtype, found.scales.shape, found.block) == (torch.float8_e4m3fn, (7, 1), (1, 50))
    exact = weight.double()
    scales = exact.abs().amax(dim=1, keepdim=True) / 448
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-6, atol=0)
    values = found.values().double()
    assert not values[3].any()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[codes.isfinite()]
    nearest = ((exact / scales.clamp(min=1e-300))[..., None] - codes).abs().amin(dim=-1) * scales
    assert ((values - exact).abs() <= nearest + 1e-6 * exact.abs().amax(dim=1, keepdim=True)).all()


def test_fp8_refuses_what_is_not_finite_and_models_that_are_split() -> None:
    weight = torch.full((2, 3), float("inf"))
    with pytest.raises(CorruptModelFile, match=r"model: tensor 'a\.weight': expected finite numbers"):
        list(quantize_online([("a.weight", weight)], {"a.weight"}, "fp8", "model"))
    with pytest.raises(InvalidConfig, match="quantization fp8 needs tensor_parallel_size 1, got 2"):
        EngineConfig(quantization="fp8", tensor_parallel_size=2)
