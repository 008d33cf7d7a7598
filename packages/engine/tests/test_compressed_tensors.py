"""compressed-tensors checkpoints against plain statements of their layouts, and through `LLM` against Transformers."""

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

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def stream(codes: Array, bits: int) -> Array:
    """Pack each row's codes as one stream of bits, lowest first, filled up to whole words of int32."""
    planes = (codes[:, :, None] >> np.arange(bits)) & 1
    planes = planes.reshape(len(codes), -1)
    planes = np.pad(planes, ((0, 0), (0, -planes.shape[1] % 32))).reshape(len(codes), -1, 32)
    return (planes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def e4m3(codes: Array) -> Array:
    """Return what bytes mean as floats of 4 bits of exponent and 3 of mantissa."""
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


def to_e4m3(values: Array) -> Array:
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


class Packer:
    """Rounds weights as `arguments` say, and stores them in a format."""

    def __init__(self, format_: str, **arguments: Any) -> None:
        self.format, self.arguments = format_, {"num_bits": 8, "type": "int", "symmetric": True, **arguments}
        self.rng = np.random.default_rng(5)

    @property
    def settings(self) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": self.arguments, "input_activations": {"num_bits": 8}}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "sparsity_config": {},
        }

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns that share a scale."""
        size = self.arguments.get("group_size")
        by_strategy = {"tensor": shape, "channel": (1, shape[1]), "group": (1, size), "tensor_group": (1, size)}
        return by_strategy.get(self.arguments["strategy"]) or tuple(self.arguments["block_structure"])

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        rows, columns = self.blocks(tuple(weight.shape))
        of_row, of_column = np.arange(weight.shape[0]) // rows, np.arange(weight.shape[1]) // columns
        num_scales = of_row[-1] + 1, of_column[-1] + 1

        def spread(scales: Array) -> Array:
            return scales[of_row][:, of_column].astype(np.float32)

        pack = self.integers if self.arguments["type"] == "int" else self.floats
        parts, values = pack(weight.numpy(), num_scales, spread)
        return {part: torch.from_numpy(np.array(array)) for part, array in parts.items()}, torch.from_numpy(values)

    def integers(self, weight: Array, num_scales: tuple[int, int], spread: Callable[..., Array]) -> Any:
        bits = self.arguments["num_bits"]
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scales = (self.rng.uniform(0.5, 1.5, num_scales) * 1.2 / 2**bits).astype(np.float16)
        zeros = np.zeros(num_scales, np.int64)
        if not self.arguments["symmetric"]:
            zeros = self.rng.integers(low, high + 1, num_scales)
        numbers = np.rint(weight / spread(scales) + spread(zeros)).clip(low, high).astype(np.int64)
        values = spread(scales) * (numbers - spread(zeros)).astype(np.float32)
        parts: dict[str, Any] = {"weight_scale": scales}
        if self.format == "pack-quantized":
            parts |= {"weight_packed": stream(numbers - low, bits), "weight_shape": np.array(weight.shape)}
            if not self.arguments["symmetric"]:
                packed = self.arguments["strategy"] != "tensor"
                parts["weight_zero_point"] = stream((zeros - low).T, bits).T if packed else zeros[0].astype(np.int8)
        else:
            parts["weight"] = numbers.astype(np.int8)
            if not self.arguments["symmetric"]:
                parts["weight_zero_point"] = zeros.astype(np.int8)
        return parts, values

    def floats(self, weight: Array, num_scales: tuple[int, int], spread: Callable[..., Array]) -> Any:
        scales = self.rng.uniform(0.01, 0.05, num_scales).astype(np.float32)
        parts: dict[str, Any] = {"weight_scale": scales}
        if self.format.startswith("mx"):
            exponents = self.rng.integers(121, 124, num_scales).astype(np.uint8)
            parts["weight_scale"], scales = exponents, 2.0 ** (exponents.astype(np.float32) - 127)
        if self.format.startswith("nvfp4"):
            whole = np.array([300.0], np.float32)
            stored = to_e4m3(scales * whole)
            parts |= {"weight_scale": stored, "weight_global_scale": whole}
            scales = e4m3(stored) / whole
        if self.arguments["num_bits"] == 8:
            codes = to_e4m3(weight / spread(scales))
            return parts | {"weight": codes}, e4m3(codes) * spread(scales)
        codes = np.abs((weight / spread(scales))[..., None] - FP4).argmin(-1)
        codes[0, :2] = 8  # minus zero
        return parts | {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)}, FP4[codes] * spread(
            scales
        )


class AsFloat8(Packer):
    """Stores bytes of FP8 under the dtype that they have."""

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        made = super().__call__(name, weight)
        if made is not None:
            part = "weight_scale" if self.format.startswith("nvfp4") else "weight"
            made[0][part] = made[0][part].view(torch.float8_e4m3fn)
        return made


W4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
FP4_32 = {"num_bits": 4, "type": "float", "group_size": 32}
PACKERS = {
    "W4A16": Packer("pack-quantized", **W4),
    "W4A16, asymmetric": Packer("pack-quantized", **W4, symmetric=False),
    "W8A16 by channel": Packer("pack-quantized", strategy="channel", group_size=-1, symmetric=False),
    "W3A16": Packer("pack-quantized", num_bits=3, strategy="group", group_size=32, symmetric=False),
    "W4A16 by tensor, asymmetric": Packer("pack-quantized", num_bits=4, strategy="tensor", symmetric=False),
    "W4A8 in bytes": Packer("int-quantized", **W4, symmetric=False),
    "W8A8 by channel": Packer("int-quantized", strategy="channel"),
    "W8A8 by tensor, asymmetric": Packer("int-quantized", strategy="tensor", symmetric=False),
    "int8 by group": Packer("naive-quantized", strategy="group", group_size=32, symmetric=False),
    "FP8 by tensor": AsFloat8("float-quantized", type="float", strategy="tensor"),
    "FP8 by channel": AsFloat8("float-quantized", type="float", strategy="channel"),
    "FP8 by block": AsFloat8("float-quantized", type="float", strategy="block", block_structure=[48, 40]),
    "MXFP8": AsFloat8("mxfp8-quantized", type="float", strategy="group", group_size=32),
    "NVFP4": AsFloat8("nvfp4-pack-quantized", **(FP4_32 | {"group_size": 16}), strategy="tensor_group"),
    "MXFP4": Packer("mxfp4-pack-quantized", **FP4_32, strategy="group"),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_values_are_those_of_the_layout(packer: Packer, make_quantised: MakeQuantised) -> None:
    made = make_quantised(packer, packer.settings)
    assert len(made.linears) == 14
    made.check_values()


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("W4A16, asymmetric", 1),
        ("W4A16, asymmetric", 2),
        ("W8A8 by channel", 4),
        ("FP8 by block", 1),
        ("FP8 by block", 2),
        ("NVFP4", 1),
        ("MXFP4", 2),
    ],
)
def test_tokens_are_those_of_transformers(name: str, num_ranks: int, make_quantised: MakeQuantised) -> None:
    make_quantised(PACKERS[name], PACKERS[name].settings).check_tokens(num_ranks)


def test_experts_of_a_mixture_stay_in_codes(make_quantised: MakeQuantised) -> None:
    """Gates in another format than what they are multiplied with, and the router left as it is."""
    rest, gates = PACKERS["W4A16"], PACKERS["FP8 by channel"]

    def quantise(name: str, weight: Tensor) -> Packed | None:
        return (gates if name.endswith("w1") else rest)(name, weight)

    groups = {
        "rest": {"targets": ["Linear"], "weights": rest.arguments, "format": rest.format},
        "gates": {"targets": ["re:.*experts.*w1$"], "weights": gates.arguments, "format": gates.format},
    }
    settings = {**rest.settings, "format": "mixed-precision", "config_groups": groups}
    settings["ignore"] = ["lm_head", "re:.*block_sparse_moe.gate"]
    made = make_quantised(quantise, settings, num_experts=3)
    assert len(made.linears) == 2 * (4 + 3 * 3)
    made.check_values()
    made.check_tokens()
    made.check_tokens(2, expert_parallel=True)


# Scales of blocks are held once for each output: a part of the codes that counts in blocks smaller than models have.
LARGE_BLOCKS = {"FP8 by block": AsFloat8("float-quantized", type="float", strategy="block", block_structure=[128, 128])}


@pytest.mark.parametrize("packer", (PACKERS | LARGE_BLOCKS).values(), ids=PACKERS)
def test_memory_at_rest_is_that_of_the_file(packer: Packer, make_quantised: MakeQuantised) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    make_quantised(packer, packer.settings, **sizes).check_memory()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_damaged_files_end_in_typed_errors(packer: Packer, make_quantised: MakeQuantised) -> None:
    make_quantised(packer, packer.settings).check_mutations()


def test_inputs_in_the_order_of_their_importance_have_the_groups_that_are_stored(make_quantised: MakeQuantised) -> None:
    packer = Packer("pack-quantized", **W4, actorder="group")

    def quantise(name: str, weight: Tensor) -> Packed | None:
        made = packer(name, weight)
        if made is not None:
            parts, values = made
            order = torch.randperm(weight.shape[1])
            scales = parts["weight_scale"].float()
            numbers = values / scales.repeat_interleave(32, dim=1)
            groups = (torch.arange(weight.shape[1]) // 32)[order]
            made = parts | {"weight_g_idx": groups.int()}, numbers.round() * scales[:, groups]
        return made

    made = make_quantised(quantise, packer.settings)
    made.check_values()
    made.check_tokens()


def test_targets_by_name_and_pattern_come_before_those_by_class(make_quantised: MakeQuantised) -> None:
    packers = {"down": Packer("pack-quantized", num_bits=8, strategy="channel"), "up": PACKERS["FP8 by block"]}
    rest = PACKERS["W4A16, asymmetric"]

    def quantise(name: str, weight: Tensor) -> Packed | None:
        return next((packer for part, packer in packers.items() if f".{part}_" in name), rest)(name, weight)

    groups = {
        "rest": {"targets": ["Linear"], "weights": rest.arguments, "format": rest.format},
        "up": {"targets": ["re:.*up_proj"], "weights": packers["up"].arguments, "format": "float-quantized"},
        "down": {
            "targets": [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)],
            "weights": packers["down"].arguments,
            "format": "pack-quantized",
        },
    }
    settings = {**rest.settings, "format": "mixed-precision", "config_groups": groups}
    made = make_quantised(quantise, settings)
    made.check_values()
    made.check_tokens()


def changed(packer: Packer, key: str, value: Any) -> dict[str, Any]:
    """Return settings with one changed: of the weights if the packer has it there, else of the whole."""
    settings = packer.settings
    weights = settings["config_groups"]["group_0"]["weights"]
    if key in weights or key == "block_structure":
        settings["config_groups"]["group_0"]["weights"] = {**weights, key: value}
        return settings
    return {**settings, key: value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "marlin-24", r"format 'marlin-24' is not supported; it leaves zeros of sparse weights out"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, r"sparsity_config: format 'sparse-24-bitmask' is not"),
        ("format", "mixed-precision", r"format 'mixed-precision' is not supported; each of config_groups has to name"),
        ("transform_config", {"config_groups": {}}, r"transform_config .* is not supported; weights without"),
        ("quantization_status", "frozen", r"quantization_status 'frozen' is not supported; these are: compressed"),
        ("config_groups", {"g": {"targets": ["re:["]}}, r"no target is 'model.layers.0"),
        ("config_groups", {"g": {"targets": ["Embedding"], "weights": {}, "format": "int-quantized"}}, r"no target is"),
        ("config_groups", {"g": {"targets": ["re:["], "weights": {}}}, r"targets: expected a regular expression"),
        ("config_groups", {"g": {"targets": 3, "weights": {}}}, r"targets: expected a list of strings, found 3"),
        ("num_bits", 9, r"weights: num_bits 9 is not supported; these are: 2, 3, 4"),
        ("format", "float-quantized", r"weights: num_bits 4 is not supported; 'float-quantized' does not hold such"),
        ("num_bits", 8, r"tensor '\S+.weight_packed': expected codes of 8 bits of the shape \[\d+, \d+\], found"),
        ("strategy", "token", r"strategy 'token' is not supported"),
        ("strategy", "channel", r"group_size: expected a number for groups alone, as the strategy is 'channel'"),
        ("group_size", 16, r"tensor '\S+.weight_scale': expected shape \[\d+, \d\], found \[\d+, \d\]"),
        ("type", "float", r"num_bits 4 is not supported; 'pack-quantized' does not hold such numbers of type 'float'"),
        ("symmetric", False, r"expected tensor '\S+.weight_zero_point' beside \S+, \S+, \S+, found none"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) and " " not in value else "",
)
def test_settings_that_are_wrong_are_named(key: str, value: Any, message: str, make_quantised: MakeQuantised) -> None:
    packer = PACKERS["W4A16"]
    folder = make_quantised(packer, changed(packer, key, value)).folder
    with pytest.raises((UnsupportedModel, CorruptModelFile), match=message):
        list(FolderSource(folder).weights())


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("W4A16", "weight_packed", lambda t: t[:5], r"expected codes of 4 bits of the shape \[64, 96\], found \[5, 12"),
        ("FP8 by block", "weight_scale", lambda t: t[:1], r"expected shape \[2, 3\], found \[1, 3\]"),
        ("MXFP4", "weight_scale", lambda t: t.fill_(255), "expected finite scales, found 255, which stands for NaN"),
        ("NVFP4", "weight_global_scale", lambda t: t * 0, r"expected one number other than 0, found \[0.0\]"),
        ("NVFP4", "weight_scale", lambda t: t.view(torch.uint8).fill_(127).view(t.dtype), "expected finite numbers"),
        ("W8A8 by channel", "weight_scale", lambda t: t * float("inf"), "expected finite numbers, found NaN or"),
        ("W8A8 by channel", "weight", lambda t: t.short(), "expected dtype torch.int8, found torch.int16"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) and "expected" not in value else "",
)
def test_tensors_that_do_not_fit_are_named(
    name: str, part: str, change: Callable[[Tensor], Tensor], message: str, make_quantised: MakeQuantised
) -> None:
    packer = PACKERS[name]

    def quantise(linear: str, weight: Tensor) -> Packed | None:
        made = packer(linear, weight)
        if made is not None and linear.endswith("0.mlp.down_proj"):
            made[0][part] = change(made[0][part])
        return made

    folder = make_quantised(quantise, packer.settings).folder
    with pytest.raises(CorruptModelFile, match=f"model.safetensors: tensor '[^']*.{part}': {message}"):
        list(FolderSource(folder).weights())
