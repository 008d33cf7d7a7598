"""compressed-tensors checkpoints that its own library wrote, against what it reads in them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("compressed_tensors", reason="`nox -s formats` installs the libraries that write formats")

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.errors import UnsupportedModel
from octavo_engine.weights.source import FolderSource

ASYMMETRIC = {"symmetric": False}
OF_OUR_OWN = {
    "W4A16 by channel, asymmetric": {"num_bits": 4, "strategy": "channel", **ASYMMETRIC},
    "W4A16 by tensor, asymmetric": {"num_bits": 4, "strategy": "tensor", **ASYMMETRIC},
    "W4A16 in the order of importance": {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "weight"},
    "W8A16 by channel": {"num_bits": 8, "strategy": "channel"},
    "W3A16 by group, asymmetric": {"num_bits": 3, "strategy": "group", "group_size": 32, **ASYMMETRIC},
    "W8A8 by channel, asymmetric": {"num_bits": 8, "strategy": "channel", **ASYMMETRIC},
    "W8A8 by tensor, asymmetric": {"num_bits": 8, "strategy": "tensor", **ASYMMETRIC},
    "W8A8 by group, asymmetric": {"num_bits": 8, "strategy": "group", "group_size": 32, **ASYMMETRIC},
    "W4A8 by channel, asymmetric": {"num_bits": 4, "strategy": "channel", **ASYMMETRIC},
    "FP8A16 by block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 64]},
}
PRESETS = (
    *("W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W5A16", "W8A16", "W4A8", "W4AFP8", "W8A8"),
    *("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8"),
)


def scheme_of(name: str) -> QuantizationScheme:
    if name in PRESETS:
        return preset_name_to_scheme(name, ["Linear"])
    rounded = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if "A8" in name else None
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**OF_OUR_OWN[name]), input_activations=rounded
    )


def blocks_of(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Return a weight as [row blocks, column blocks, values that share a scale]."""
    whole = tuple(weight.shape)
    by_strategy = {"tensor": whole, "channel": (1, whole[1]), "block": args.block_structure}
    rows, columns = by_strategy.get(args.strategy) or (1, args.group_size)
    weight = F.pad(weight, (0, -whole[1] % columns, 0, -whole[0] % rows))
    return weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)


def calibrate(linear: Any) -> None:
    """Give a linear the scales and zeros that the library computes from the range of its weights."""
    args, weight = linear.quantization_scheme.weights, linear.weight.data
    whole = None
    if hasattr(linear, "weight_global_scale"):
        whole = linear.weight_global_scale.data = generate_gparam(weight.min(), weight.max())
    blocks = blocks_of(weight, args)
    scales, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=whole)
    linear.weight_scale.data = scales.reshape(linear.weight_scale.shape)
    linear.weight_zero_point.data = zeros.reshape(linear.weight_zero_point.shape)


class Library:
    """Quantises by schemes, and saves, with what LLM Compressor calls."""

    def __init__(self, **schemes: QuantizationScheme) -> None:
        self.schemes = schemes

    def __call__(self, model: Any, folder: Path) -> dict[str, Tensor]:
        config = QuantizationConfig(config_groups=self.schemes, ignore=["lm_head", r"re:.*block_sparse_moe\.gate"])
        apply_quantization_config(model, config, show_progress=False)
        linears = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
        for linear in linears.values():
            calibrate(linear)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            save_file(model.state_dict(), folder / "model.safetensors")
        compressor.update_config(str(folder))
        compressor.decompress_model(model)
        return {name: linear.weight for name, linear in linears.items()}


@pytest.mark.parametrize("name", [*PRESETS, *OF_OUR_OWN])
def test_values_are_those_of_the_library(name: str, made_by: Any) -> None:
    made = made_by(Library(linears=scheme_of(name)))
    assert len(made.values) == 14
    made.check_values()
    made.check_products()


@pytest.mark.parametrize("name", [name for name in OF_OUR_OWN if "A8" in name])
def test_asymmetric_weights_beside_rounded_activations_are_whole_bytes(name: str, made_by: Any) -> None:
    """Which the test of values relies on: the library leaves codes and zeros of these unpacked, and zeros differ."""
    made = made_by(Library(linears=scheme_of(name)))
    settings = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "int-quantized"
    with safe_open(made.folder / "model.safetensors", "pt") as file:
        zeros = file.get_tensor("model.layers.0.mlp.up_proj.weight_zero_point")
    assert zeros.dtype == torch.int8
    assert bool((zeros != 0).any())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_half_the_width_are_ours_rounded(name: str, dtype: torch.dtype, made_by: Any) -> None:
    made_by(Library(linears=scheme_of(name)), dtype=dtype).check_values()


@pytest.mark.parametrize("name", ["W4A16_ASYM", "FP8_BLOCK", "NVFP4"])
def test_two_ranks_have_the_products_of_the_library(name: str, made_by: Any) -> None:
    made_by(Library(linears=scheme_of(name))).check_products(2)


@pytest.mark.parametrize("options", [{}, {"num_ranks": 2, "expert_parallel": True}], ids=["alone", "experts dealt out"])
def test_experts_of_a_mixture_have_the_products_of_the_library(options: dict[str, Any], made_by: Any) -> None:
    """Gates and what they are multiplied with are of two formats, attention of a third."""
    schemes = {
        "attention": preset_name_to_scheme("W8A8", [r"re:.*self_attn\..*_proj"]),
        "gates": preset_name_to_scheme("MXFP4", [r"re:.*experts.*\.w1"]),
        "rest": preset_name_to_scheme("W4A16", [r"re:.*experts.*\.w[23]"]),
    }
    made = made_by(Library(**schemes), "Mixtral")
    assert len(made.values) == 2 * (4 + 3 * 3)
    made.check_values()
    made.check_products(**options)


def test_a_format_that_we_do_not_read_is_named(made_by: Any) -> None:
    made = made_by(Library(linears=preset_name_to_scheme("MXFP6A16", ["Linear"])))
    with pytest.raises(UnsupportedModel, match="mxfp6-pack-quantized"):
        FolderSource(made.folder)
