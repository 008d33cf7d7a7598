"""TorchAO checkpoints against plain statements of their layouts, and through `LLM` against Transformers."""

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


class Packer:
    """Rounds weights to whole numbers or FP8 with a scale for so many columns, and flattens them as TorchAO does."""

    def __init__(self, kind: str, bits: int = 8, columns: int = 0, zeros: torch.dtype | None = None) -> None:
        self.kind, self.bits, self.columns, self.zeros = kind, bits, columns, zeros
        self.settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": "AnyConfig"}}}
        self.rng = np.random.default_rng(5)
        self.metadata: dict[str, str] = {}

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        self.metadata[f"{name}.weight"] = json.dumps({"_type": self.kind, "_data": {}})
        columns = self.columns or weight.shape[1]
        groups = np.arange(weight.shape[1]) // columns
        scales = (self.rng.uniform(0.5, 1.5, (len(weight), groups[-1] + 1)) / 2**self.bits).astype(np.float32)
        parts = {"_weight_scale": torch.from_numpy(scales)}
        if self.kind == "Float8Tensor":
            codes = torch.from_numpy(weight.numpy() / scales[:, groups]).clamp(-448, 448).to(torch.float8_e4m3fn)
            return parts | {"_weight_qdata": codes}, codes.float() * torch.from_numpy(scales[:, groups])
        top = 2 ** (self.bits - 1)
        zeros = np.zeros(scales.shape) if self.zeros is None else self.rng.integers(-top, top, scales.shape)
        numbers = np.rint(weight.numpy() / scales[:, groups] + zeros[:, groups]).clip(-top, top - 1)
        parts["_weight_qdata"] = torch.from_numpy(numbers.astype(np.int8))
        if self.zeros is not None:
            parts["_weight_zero_point"] = torch.from_numpy(zeros).to(self.zeros)
        values = (numbers - zeros[:, groups]).astype(np.float32) * scales[:, groups]
        return parts, torch.from_numpy(values)


PACKERS = {
    "Int8Tensor": Packer("Int8Tensor"),
    "IntxUnpackedToInt8Tensor": Packer("IntxUnpackedToInt8Tensor", 4, 32, torch.bfloat16),
    "IntxUnpackedToInt8Tensor, zeros in int8": Packer("IntxUnpackedToInt8Tensor", 8, 32, torch.int8),
    "Float8Tensor": Packer("Float8Tensor"),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_values_are_those_of_the_layout(packer: Packer, make_quantised: MakeQuantised) -> None:
    made = make_quantised(packer, packer.settings, metadata=packer.metadata)
    assert len(made.linears) == 14
    made.check_values()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tokens_are_those_of_transformers(num_ranks: int, make_quantised: MakeQuantised) -> None:
    packer = PACKERS["IntxUnpackedToInt8Tensor"]
    make_quantised(packer, packer.settings, metadata=packer.metadata).check_tokens(num_ranks)


@pytest.mark.parametrize("name", ["IntxUnpackedToInt8Tensor, zeros in int8", "Float8Tensor"])
def test_experts_of_a_mixture_stay_in_codes(name: str, make_quantised: MakeQuantised) -> None:
    packer = PACKERS[name]
    made = make_quantised(packer, packer.settings, metadata=packer.metadata, num_experts=2)
    assert len(made.linears) == 2 * (4 + 2 * 3)
    made.check_values()
    made.check_tokens(2, expert_parallel=True)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_memory_at_rest_is_that_of_the_file(packer: Packer, make_quantised: MakeQuantised) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    make_quantised(packer, packer.settings, metadata=packer.metadata, **sizes).check_memory()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_damaged_files_end_in_typed_errors(packer: Packer, make_quantised: MakeQuantised) -> None:
    make_quantised(packer, packer.settings, metadata=packer.metadata).check_mutations()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("_weight_zero_point", lambda t: t + 0.5, "_weight_zero_point': expected whole numbers from -128 to 128"),
        (
            "_weight_scale",
            lambda t: t[:, :2],
            r"_weight_scale': expected two dimensions that divide|_zero_point': expected",
        ),
        (
            "_weight_scale",
            lambda t: t[:2],
            r"_weight_scale': expected a scale for every row, or one for all, found \[2, 3\]",
        ),
        (
            "_weight_scale",
            lambda t: t[0],
            r"_weight_scale': expected two dimensions that divide \[64, 96\], found \[3\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    part: str, change: Callable[[Tensor], Tensor], message: str, make_quantised: MakeQuantised
) -> None:
    packer = Packer("IntxUnpackedToInt8Tensor", 4, 32, torch.float32)

    def quantise(name: str, weight: Tensor) -> Packed | None:
        made = packer(name, weight)
        if made is not None and name.endswith("0.mlp.down_proj"):
            made[0][part] = change(made[0][part])
        return made

    folder = make_quantised(quantise, packer.settings, metadata=packer.metadata).folder
    with pytest.raises(CorruptModelFile, match=f"model.safetensors: tensor '.*down_proj.{message}"):
        list(FolderSource(folder).weights())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"_type": "Int4TilePackedTo4dTensor"}', r"TorchAO's type 'Int4TilePackedTo4dTensor' is not supported; these"),
        ("{", r"model.safetensors: metadata of 'model.layers.\S+.weight': expected a JSON object, found '{'"),
        ("3", r"metadata of 'model.layers.\S+.weight': expected a JSON object, found '3'"),
        (None, r"metadata of 'model.layers.\S+.weight': expected a JSON object, found None"),
    ],
)
def test_types_that_are_not_known_are_refused(
    metadata: str | None, message: str, make_quantised: MakeQuantised
) -> None:
    packer = Packer("Int8Tensor")
    made = make_quantised(packer, packer.settings)
    described = {} if metadata is None else dict.fromkeys(packer.metadata, metadata)
    folder = make_quantised(packer, packer.settings, metadata=described).folder
    assert made.folder == folder
    with pytest.raises((UnsupportedModel, CorruptModelFile), match=message):
        list(FolderSource(folder).weights())
