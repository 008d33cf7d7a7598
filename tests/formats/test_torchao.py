"""TorchAO checkpoints that its own library wrote, by itself and through Transformers, against what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchao", reason="`nox -s formats` installs the libraries that write formats")

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor

CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": lambda: Int8WeightOnlyConfig(version=2),
    "int8 by group": lambda: Int8WeightOnlyConfig(version=2, granularity=PerGroup(32)),
    "int8 of inputs too": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    "int4 by group": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int4 by group, asymmetric": lambda: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32), weight_mapping_type=MappingType.ASYMMETRIC
    ),
    "int3 by row": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)),
    "float8": lambda: Float8WeightOnlyConfig(),
}


class Library:
    """Quantises as Transformers does when it loads, and saves."""

    def __init__(self, name: str) -> None:
        self.config = CONFIGS[name]()

    def __call__(self, model: Any, folder: Path) -> dict[str, Tensor]:
        quantise = self.through_transformers if hasattr(model, "save_pretrained") else self.by_itself
        weights = quantise(model, folder).state_dict()
        quantised = {name: weight for name, weight in weights.items() if isinstance(weight, TorchAOBaseTensor)}
        return {name.removesuffix(".weight"): weight.dequantize() for name, weight in quantised.items()}

    def through_transformers(self, model: Any, folder: Path) -> nn.Module:
        model.save_pretrained(folder)
        config = transformers.TorchAoConfig(self.config)
        kind = type(model)
        model = kind.from_pretrained(folder, quantization_config=config, dtype=model.dtype, device_map="cpu")
        model.save_pretrained(folder)
        return model

    def by_itself(self, model: Any, folder: Path) -> nn.Module:
        def is_quantised(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and name.endswith(("_proj", ".w1", ".w2", ".w3"))

        quantize_(model, self.config, is_quantised)
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        save_file(tensors, folder / "model.safetensors", metadata)
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"] = transformers.TorchAoConfig(self.config).to_dict()
        (folder / "config.json").write_text(json.dumps(described))
        return model


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_of_the_library(name: str, made_by: Any) -> None:
    made = made_by(Library(name))
    assert len(made.values) == 14
    made.check_values()
    made.check_products()


@pytest.mark.parametrize("name", CONFIGS)
def test_values_of_half_the_width_are_ours_rounded(name: str, made_by: Any) -> None:
    made_by(Library(name), dtype=torch.bfloat16).check_values()


@pytest.mark.parametrize("name", ["int4 by group, asymmetric", "float8"])
def test_two_ranks_have_the_products_of_the_library(name: str, made_by: Any) -> None:
    made_by(Library(name)).check_products(2)


@pytest.mark.parametrize("name", ["int8", "int4 by group"])
def test_experts_of_a_mixture_have_the_products_of_the_library(name: str, made_by: Any) -> None:
    made = made_by(Library(name), "Mixtral")
    assert len(made.values) == 2 * (4 + 3 * 3)
    made.check_values()
    made.check_products(2, expert_parallel=True)
