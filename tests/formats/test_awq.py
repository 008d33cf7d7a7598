"""AWQ checkpoints of random codes against AutoAWQ's own dequantisation.

AutoAWQ's package cannot be imported beside Transformers 5, as its last release is older; the one file of it that
unpacks and dequantises needs torch alone, and is loaded by its path. Of the layout `gemv` it has kernels for GPUs only,
and GPTQModel requires a later torch and changes Transformers as it is imported: these are held against NumPy alone, in
the engine's own tests.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

package = importlib.util.find_spec("awq")
if package is None or package.origin is None:
    pytest.skip("`nox -s formats` installs the libraries that write formats", allow_module_level=True)

GROUP_SIZE = 32


def packing_utils() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "packing_utils", Path(package.origin).with_name("utils") / "packing_utils.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Library:
    """Stores random codes and zeros; any words are codes."""

    def __call__(self, model: Any, folder: Path) -> dict[str, Tensor]:
        dequantise = packing_utils().dequantize_gemm
        generator = torch.Generator().manual_seed(5)
        stored, values = dict(model.state_dict()), {}
        for name in [name for name in stored if name.endswith(("_proj.weight", *(f".w{i}.weight" for i in (1, 2, 3))))]:
            out_features, in_features = stored.pop(name).shape
            linear, shapes = name.removesuffix(".weight"), {"qweight": in_features, "qzeros": in_features // GROUP_SIZE}
            words = {
                part: torch.randint(-(1 << 31), 1 << 31, (rows, out_features // 8), generator=generator).int()
                for part, rows in shapes.items()
            }
            scales = torch.rand(shapes["qzeros"], out_features, generator=generator).add(0.5).mul(0.02).half()
            stored |= {f"{linear}.{part}": tensor for part, tensor in (words | {"scales": scales}).items()}
            # In float32, which holds a factor of 16 bits times a small whole number.
            values[linear] = dequantise(*words.values(), scales.float(), 4, GROUP_SIZE).T
        save_file(stored, folder / "model.safetensors")
        settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
        architectures = [model.config.architectures[0] if model.config.architectures else type(model).__name__]
        described = model.config.to_dict() | {"architectures": architectures, "quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(described))
        return values


def test_values_and_products_are_those_of_the_library(made_by: Any) -> None:
    made = made_by(Library())
    assert len(made.values) == 14
    made.check_values()
    made.check_products()
    made.check_products(2)


def test_experts_of_a_mixture_have_the_products_of_the_library(made_by: Any) -> None:
    made = made_by(Library(), "Mixtral")
    assert len(made.values) == 2 * (4 + 3 * 3)
    made.check_values()
    made.check_products(2, expert_parallel=True)
