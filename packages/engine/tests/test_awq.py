"""AWQ checkpoints against a plain statement of their layouts, and through `LLM` against Transformers."""

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

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbours each field of a word holds, lowest bits first."""


def words(codes: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Pack 8 neighbouring columns in a word: [n, columns] -> [n, columns / 8] int32."""
    packed = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for word in range(packed.shape[1]):
        for field, place in enumerate(order):
            packed[:, word] |= codes[:, 8 * word + place].astype(np.uint32) << np.uint32(4 * field)
    return packed.view(np.int32)


def gemm(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    return {"qweight": words(codes.T, GEMM_ORDER), "qzeros": words(zeros.T, GEMM_ORDER), "scales": scales.T.copy()}


def gemv(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Fill groups up to multiples of 32, as the kernels of AutoAWQ want groups of 32 inputs."""
    missing = -scales.shape[1] % 32
    zeros, scales = (np.pad(array, ((0, 0), (0, missing))) for array in (zeros, scales))
    return {"qweight": words(codes, tuple(range(8))), "qzeros": words(zeros, tuple(range(8))), "scales": scales}


class Packer:
    """Rounds weights to 4 bits per group of inputs, and stores them in a layout."""

    def __init__(self, layout: Callable[..., dict[str, np.ndarray]], group_size: int = 32) -> None:
        self.layout, self.group_size = layout, group_size
        self.rng = np.random.default_rng(5)
        self.settings: dict[str, Any] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": layout.__name__,
            "modules_to_not_convert": None,
        }

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        size = weight.shape[1] if self.group_size == -1 else self.group_size
        groups = np.arange(weight.shape[1]) // size
        scales = self.rng.uniform(0.03, 0.08, (len(weight), groups[-1] + 1)).astype(np.float16)
        zeros = self.rng.integers(0, 16, scales.shape)
        codes = np.rint(weight.numpy() / scales[:, groups].astype(np.float32) + zeros[:, groups]).clip(0, 15)
        codes = codes.astype(np.int64)
        values = scales[:, groups].astype(np.float32) * (codes - zeros[:, groups]).astype(np.float32)
        parts = self.layout(codes, zeros, scales)
        return {part: torch.from_numpy(array) for part, array in parts.items()}, torch.from_numpy(values)


PACKERS = {"gemm": Packer(gemm), "gemm, one group": Packer(gemm, -1), "gemv": Packer(gemv)}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_values_are_those_of_the_layout(packer: Packer, make_quantised: MakeQuantised) -> None:
    made = make_quantised(packer, packer.settings)
    assert len(made.linears) == 14
    made.check_values()


@pytest.mark.parametrize(("name", "num_ranks"), [("gemm", 1), ("gemm", 2), ("gemv", 2)])
def test_tokens_are_those_of_transformers(name: str, num_ranks: int, make_quantised: MakeQuantised) -> None:
    make_quantised(PACKERS[name], PACKERS[name].settings).check_tokens(num_ranks)


def test_experts_of_a_mixture_stay_in_codes(make_quantised: MakeQuantised) -> None:
    settings = PACKERS["gemm"].settings | {"modules_to_not_convert": ["gate"]}
    made = make_quantised(PACKERS["gemm"], settings, num_experts=3)
    assert len(made.linears) == 2 * (4 + 3 * 3)
    made.check_values()
    made.check_tokens()
    made.check_tokens(2, expert_parallel=True)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_memory_at_rest_is_that_of_the_file(packer: Packer, make_quantised: MakeQuantised) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    make_quantised(packer, packer.settings, **sizes).check_memory()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_damaged_files_end_in_typed_errors(packer: Packer, make_quantised: MakeQuantised) -> None:
    make_quantised(packer, packer.settings).check_mutations()


def test_some_rows_are_those_of_the_whole(make_quantised: MakeQuantised) -> None:
    for packer in (Packer(gemm), Packer(gemv)):
        weights = dict(FolderSource(make_quantised(packer, packer.settings).folder).weights())
        weight = weights["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(weight.values(slice(13, 40)), weight.values()[13:40])


def test_the_file_that_older_quantisers_write_is_read(make_quantised: MakeQuantised) -> None:
    made = make_quantised(Packer(gemm), None)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (made.folder / "quant_config.json").write_text(json.dumps(settings))
    made.check_values()


def test_auto_round_has_the_same_layout_under_its_own_settings(make_quantised: MakeQuantised) -> None:
    settings = {"quant_method": "intel/auto-round", "packing_format": "auto_round:auto_awq", "bits": 4}
    make_quantised(Packer(gemm), settings | {"group_size": 32, "sym": False}).check_values()
    with pytest.raises(UnsupportedModel, match=r"packing_format 'auto_round:llm_compressor' is not supported"):
        FolderSource(make_quantised(Packer(gemm), settings | {"packing_format": "auto_round:llm_compressor"}).folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"bits 3 is not supported; these are: 4"),
        ({"zero_point": False}, r"zero_point False is not supported; true is"),
        ({"version": "gemv_fast"}, r"version 'gemv_fast' is not supported; these are: gemm, exllama, ipex, gemv"),
        ({"backend": "llm-awq"}, r"backend 'llm-awq' is not supported; these are: autoawq"),
        ({"rounding": "up"}, r"key 'rounding' \(here 'up'\) is not known"),
        ({"group_size": 64}, r"tensor 'model.layers.\S+.qzeros': expected shape \[2, 8\], found \[3, 8\]"),
        ({"version": "gemv"}, r"tensor 'model.layers.\S+.qzeros': expected a shape \[96, at least 1\], found \[3, 8\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_wrong_are_named(
    settings: dict[str, Any], message: str, make_quantised: MakeQuantised
) -> None:
    packer = Packer(gemm)
    folder = make_quantised(packer, {**packer.settings, **settings}).folder
    with pytest.raises((UnsupportedModel, CorruptModelFile), match=message):
        list(FolderSource(folder).weights())
