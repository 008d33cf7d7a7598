"""bitsandbytes checkpoints that its own library wrote, by itself and through Transformers, against what it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes", reason="`nox -s formats` installs the libraries that write formats")

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4, twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def dequantised(linear: Any) -> Tensor:
    weight = linear.weight
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    return int8_vectorwise_dequant(weight.data, weight.SCB)


class Library:
    """Quantises as Transformers does when it loads, and saves."""

    def __init__(self, name: str) -> None:
        self.config = transformers.BitsAndBytesConfig(**CONFIGS[name])

    def __call__(self, model: Any, folder: Path) -> dict[str, Tensor]:
        quantise = self.through_transformers if hasattr(model, "save_pretrained") else self.by_itself
        model = quantise(model, folder)
        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        return {name: dequantised(module) for name, module in model.named_modules() if isinstance(module, kinds)}

    def through_transformers(self, model: Any, folder: Path) -> nn.Module:
        model.save_pretrained(folder)
        kind = type(model)
        model = kind.from_pretrained(folder, quantization_config=self.config, dtype=model.dtype, device_map="cpu")
        model.save_pretrained(folder)
        return model

    def by_itself(self, model: Any, folder: Path) -> nn.Module:
        weights = {name: module.weight.data for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        kept = ["lm_head", *(name for name in weights if name.endswith("moe.gate"))]
        replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=self.config)
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                settings = {**module.weight.__dict__, "requires_grad": False}
                module.weight = bitsandbytes.nn.Params4bit(weights[name], **settings).to("cpu")
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                module.weight = bitsandbytes.nn.Int8Params(weights[name], requires_grad=False).to("cpu")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"] = self.config.to_dict()
        (folder / "config.json").write_text(json.dumps(described))
        return model


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_of_the_library(name: str, made_by: Any) -> None:
    made = made_by(Library(name))
    assert len(made.values) == 14
    made.check_values()
    made.check_products()


@pytest.mark.parametrize("name", ["nf4, twice", "int8"])
def test_values_of_half_the_width_are_ours_rounded(name: str, made_by: Any) -> None:
    made_by(Library(name), dtype=torch.bfloat16).check_values()


@pytest.mark.parametrize("name", ["nf4, twice", "int8"])
def test_two_ranks_have_the_products_of_the_library(name: str, made_by: Any) -> None:
    made_by(Library(name)).check_products(2)


@pytest.mark.parametrize("name", ["fp4, twice", "int8"])
def test_experts_of_a_mixture_have_the_products_of_the_library(name: str, made_by: Any) -> None:
    made = made_by(Library(name), "Mixtral")
    assert len(made.values) == 2 * (4 + 3 * 3)
    made.check_values()
    made.check_products(2, expert_parallel=True)
