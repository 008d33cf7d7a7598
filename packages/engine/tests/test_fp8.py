"""FP8 and ModelOpt checkpoints against plain statements of their layouts, and through `LLM` against Transformers."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile, UnsupportedModel
from octavo_engine.weights.source import FolderSource

MakeQuantised = Callable[..., Any]
Packed = tuple[dict[str, Tensor], Tensor]
Array = np.ndarray[Any, Any]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(codes: Array) -> Array:
    """Return what bytes mean as floats of 4 bits of exponent and 3 of mantissa."""
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


def to_e4m3(values: Array) -> Array:
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


class Packer:
    """Stores weights in FP8, with a scale for every block of so many rows and columns (0: all)."""

    def __init__(self, rows: int, columns: int, settings: dict[str, Any], part: str = "weight_scale", dims: str = "rc"):
        self.rows, self.columns, self.settings, self.part, self.dims = rows, columns, settings, part, dims
        self.rng = np.random.default_rng(5)

    def scales(self, shape: tuple[int, int]) -> tuple[Array, Array]:
        """Return scales as they are stored, and spread over a matrix."""
        of_row = np.arange(shape[0]) // (self.rows or shape[0])
        of_column = np.arange(shape[1]) // (self.columns or shape[1])
        scales = self.rng.uniform(0.001, 0.002, (of_row[-1] + 1, of_column[-1] + 1)).astype(np.float32)
        spread = scales[of_row][:, of_column]
        shapes = {"rc": scales.shape, "r": scales.shape[:1], "": (), "1": (1,), "r1c1": (len(scales), 1, -1, 1)}
        return scales.reshape(shapes[self.dims]), spread

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        stored, spread = self.scales(tuple(weight.shape))
        codes = to_e4m3(weight.numpy() / spread)
        parts = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), self.part: torch.from_numpy(stored)}
        return parts | {"input_scale": torch.ones(())}, torch.from_numpy(e4m3(codes) * spread)


class PowersPacker(Packer):
    """Stores scales as bytes that mean powers of two, of a dtype of their own if asked."""

    typed = False

    def scales(self, shape: tuple[int, int]) -> tuple[Array, Array]:
        exponents, _ = super().scales(shape)
        bytes_ = np.log2(exponents).round().astype(int) + 127
        of_row, of_column = (
            np.arange(n) // (size or n) for n, size in zip(shape, (self.rows, self.columns), strict=True)
        )
        return bytes_.astype(np.uint8), (2.0 ** (bytes_ - 127.0))[of_row][:, of_column].astype(np.float32)

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        made = super().__call__(name, weight)
        if made is not None and self.typed:
            made[0][self.part] = made[0][self.part].view(torch.float8_e8m0fnu)
        return made


class TypedPowersPacker(PowersPacker):
    typed = True


class NVFP4Packer(Packer):
    """Stores weights in 4-bit floats with scales in FP8, and a factor of these."""

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        groups = np.arange(weight.shape[1]) // 16
        stored = to_e4m3(self.rng.uniform(100, 400, (len(weight), groups[-1] + 1)).astype(np.float32))
        factor = np.float32(0.0003)
        scales = (e4m3(stored) * factor)[:, groups]
        codes = np.abs((weight.numpy() / scales)[..., None] - E2M1).argmin(-1)
        parts = {
            "weight": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
            "weight_scale": torch.from_numpy(stored).view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(factor),
        }
        return parts, torch.from_numpy(E2M1[codes] * scales)


def modelopt(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": {"name": "modelopt"},
        "ignore": ["lm_head"],
    }


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [40, 48], "fmt": "e4m3"}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
PACKERS = {
    "fp8 by block": Packer(40, 48, BLOCKS, "weight_scale_inv"),
    "fp8 by block, powers of two": TypedPowersPacker(40, 48, BLOCKS | {"scale_fmt": "ue8m0"}, "weight_scale_inv"),
    "fp8 by tensor": Packer(0, 0, TENSOR, dims=""),
    "fbgemm_fp8": Packer(1, 0, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "ModelOpt by tensor": Packer(0, 0, modelopt("FP8"), dims="1"),
    "ModelOpt by channel": Packer(1, 0, modelopt("FP8_PER_CHANNEL_PER_TOKEN"), dims="r"),
    "ModelOpt by block": Packer(128, 128, modelopt("FP8_PB_WO"), dims="r1c1"),
    "ModelOpt MXFP8": PowersPacker(1, 32, modelopt("MXFP8")),
    "ModelOpt NVFP4": NVFP4Packer(1, 16, modelopt("NVFP4")),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_values_are_those_of_the_layout(packer: Packer, make_quantised: MakeQuantised) -> None:
    made = make_quantised(packer, packer.settings)
    assert len(made.linears) == 14
    made.check_values()


@pytest.mark.parametrize(
    ("name", "num_ranks"), [("fp8 by block, powers of two", 1), ("fp8 by block", 2), ("ModelOpt NVFP4", 2)]
)
def test_tokens_are_those_of_transformers(name: str, num_ranks: int, make_quantised: MakeQuantised) -> None:
    make_quantised(PACKERS[name], PACKERS[name].settings).check_tokens(num_ranks)


@pytest.mark.parametrize("name", ["fp8 by block", "fbgemm_fp8", "ModelOpt MXFP8", "ModelOpt NVFP4"])
def test_experts_of_a_mixture_stay_in_codes(name: str, make_quantised: MakeQuantised) -> None:
    made = make_quantised(PACKERS[name], PACKERS[name].settings, num_experts=2)
    assert len(made.linears) == 2 * (4 + 2 * 3)
    made.check_values()
    made.check_tokens(2, expert_parallel=True)


# Scales of blocks are held once for each output: a part of the codes that counts in blocks smaller than models have.
LARGE_BLOCKS = {"fp8 by block": Packer(128, 128, BLOCKS | {"weight_block_size": [128, 128]}, "weight_scale_inv")}


@pytest.mark.parametrize("packer", (PACKERS | LARGE_BLOCKS).values(), ids=PACKERS)
def test_memory_at_rest_is_that_of_the_file(packer: Packer, make_quantised: MakeQuantised) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    make_quantised(packer, packer.settings, **sizes).check_memory()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_damaged_files_end_in_typed_errors(packer: Packer, make_quantised: MakeQuantised) -> None:
    make_quantised(packer, packer.settings).check_mutations()


def test_linears_of_several_algorithms_are_told_apart(make_quantised: MakeQuantised) -> None:
    layers = {}

    def quantise(name: str, weight: Tensor) -> Packed | None:
        packer = PACKERS["ModelOpt NVFP4" if "up_proj" in name else "ModelOpt by tensor"]
        if "lm_head" not in name:
            layers[name] = {"quant_algo": packer.settings["quant_algo"], "group_size": 16 if "up" in name else None}
        return packer(name, weight)

    made = make_quantised(quantise, None)
    settings = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    (made.folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": settings}))
    made.check_values()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "fp8 by block",
            {"weight_block_size": [0, 1]},
            r"weight_block_size: expected \[rows, columns\], found \[0, 1\]",
        ),
        ("fp8 by block", {"weight_block_size": 128}, r"weight_block_size: expected \[rows, columns\], found 128"),
        ("fp8 by block", {"weight_block_size": [128, 128]}, r"\.weight_scale_inv': expected shape \[1, 1\], found \["),
        ("fp8 by block", {"fmt": "e5m2"}, r"fmt 'e5m2' is not supported"),
        ("fp8 by tensor", {"weight_block_size": [40, 48]}, r"\.weight_scale': expected shape \[\d, \d\], found \[\]"),
        ("fp8 by tensor", {"activation_scheme": "none"}, r"activation_scheme 'none' is not supported; these are"),
        ("ModelOpt by tensor", {"quant_algo": "W4A8_AWQ"}, r"quant_algo 'w4a8_awq' is not supported; these are: fp8"),
        ("ModelOpt by tensor", {"quant_algo": "NVFP4"}, r"\.weight': expected dtype torch.uint8, found torch.float8"),
        ("ModelOpt by tensor", {"quant_algo": "MIXED_PRECISION"}, r"quantized_layers: 'model.layers.0.\S+' is none of"),
        ("ModelOpt by tensor", {"quantized_layers": {"a": 3}}, r"quantized_layers: a: expected an object, found 3"),
        ("ModelOpt MXFP8", {"quant_algo": "FP8"}, r"\.weight_scale': expected dtype torch.float32 or"),
    ],
    ids=str,
)
def test_settings_that_are_wrong_are_named(
    name: str, settings: dict[str, Any], message: str, make_quantised: MakeQuantised
) -> None:
    packer = PACKERS[name]
    folder = make_quantised(packer, {**packer.settings, **settings}).folder
    with pytest.raises((UnsupportedModel, CorruptModelFile), match=message):
        list(FolderSource(folder).weights())
