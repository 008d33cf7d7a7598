"""GPTQ checkpoints against a plain statement of their layout, and through `LLM` against Transformers."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import CorruptModelFile, InvalidConfig, UnsupportedModel
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.source import FolderSource

MakeQuantised = Callable[..., Any]
Packed = tuple[dict[str, Tensor], Tensor]


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack each column's codes as one stream of bits, lowest first: [n, columns] -> [n * bits / 32, columns] int32."""
    planes = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    words = planes.reshape(-1, 32, codes.shape[1]).astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None]
    return words.sum(axis=1).astype(np.uint32).view(np.int32)


class Packer:
    """Rounds weights to codes as a GPTQ quantiser would, and stores them."""

    def __init__(
        self, bits: int = 4, group_size: int = 32, *, sym: bool = True, desc_act: bool = False, v2: bool = False
    ):
        self.bits, self.group_size, self.sym, self.desc_act, self.v2 = bits, group_size, sym, desc_act, v2
        self.g_idx = True
        self.rng = np.random.default_rng(5)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
            "damp_percent": 0.01,
        }

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        out_features, in_features = weight.shape
        size = in_features if self.group_size == -1 else self.group_size
        num_groups = -(-in_features // size)
        groups = np.arange(in_features) // size
        if self.desc_act:
            groups = self.rng.permutation(groups)
        top = 2**self.bits
        scales = self.rng.uniform(0.5, 1.5, (num_groups, out_features)) * 0.8 / top
        scales = scales.astype(np.float16)
        zeros = np.full(scales.shape, top // 2)
        if not self.sym:
            zeros = self.rng.integers(0 if self.v2 else 1, top, scales.shape)
        codes = np.rint(weight.numpy().T / scales[groups].astype(np.float32) + zeros[groups])
        codes = codes.clip(0, top - 1).astype(np.int64)
        values = scales[groups].astype(np.float32) * (codes - zeros[groups]).astype(np.float32)
        parts = {
            "qweight": stream(codes, self.bits),
            "qzeros": np.ascontiguousarray(stream((zeros - (0 if self.v2 else 1)).T, self.bits).T),
            "scales": scales,
        }
        if self.g_idx:
            parts["g_idx"] = groups.astype(np.int32)
        return {part: torch.from_numpy(array) for part, array in parts.items()}, torch.from_numpy(values.T.copy())


PACKERS = {
    "4 bits": Packer(),
    "4 bits, v2, asymmetric": Packer(sym=False, v2=True),
    "4 bits, asymmetric, desc_act": Packer(sym=False, desc_act=True),
    "4 bits, one group": Packer(group_size=-1, desc_act=True),
    "8 bits": Packer(8, 16, sym=False),
    "2 bits": Packer(2, sym=False, v2=True),
    "3 bits, desc_act": Packer(3, sym=False, desc_act=True),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_values_are_those_of_the_layout(packer: Packer, make_quantised: MakeQuantised) -> None:
    made = make_quantised(packer, packer.settings)
    assert len(made.linears) == 14
    made.check_values()


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("4 bits", 1),
        ("4 bits", 2),
        ("4 bits, asymmetric, desc_act", 1),
        ("4 bits, asymmetric, desc_act", 2),
        ("4 bits, one group", 4),
        ("3 bits, desc_act", 1),
    ],
)
def test_tokens_are_those_of_transformers(name: str, num_ranks: int, make_quantised: MakeQuantised) -> None:
    make_quantised(PACKERS[name], PACKERS[name].settings).check_tokens(num_ranks)


@pytest.mark.parametrize("name", ["4 bits", "4 bits, asymmetric, desc_act"])
def test_experts_of_a_mixture_stay_in_codes(name: str, make_quantised: MakeQuantised) -> None:
    made = make_quantised(PACKERS[name], PACKERS[name].settings, num_experts=3)
    assert len(made.linears) == 2 * (4 + 3 * 3)
    made.check_values()
    for options in ({}, {"num_ranks": 2}, {"num_ranks": 2, "expert_parallel": True}):
        made.check_tokens(**options)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_memory_at_rest_is_that_of_the_file(packer: Packer, make_quantised: MakeQuantised) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    make_quantised(packer, packer.settings, **sizes).check_memory()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_damaged_files_end_in_typed_errors(packer: Packer, make_quantised: MakeQuantised) -> None:
    make_quantised(packer, packer.settings).check_mutations()


def test_groups_that_do_not_divide_the_inputs_leave_a_smaller_last_one(make_quantised: MakeQuantised) -> None:
    packer = Packer(group_size=64, sym=False)
    packer.g_idx = False
    make_quantised(packer, packer.settings).check_values()  # of 96 inputs


def test_dynamic_rules_give_modules_their_own_bits_or_none(make_quantised: MakeQuantised) -> None:
    packers = {"up": Packer(8, 32), "down": Packer(4, -1), "rest": Packer(2, 16)}

    def quantise(name: str, weight: Tensor) -> Packed | None:
        if ".0.self_attn." in name or name == "lm_head":
            return None
        return packers["up" if "up_proj" in name else "down" if "down_proj" in name else "rest"](name, weight)

    rules = {
        "+:.*\\.up_proj": {"bits": 8},
        ".*\\.down_proj": {"group_size": -1},
        "-:.*layers\\.0\\.self_attn": {},
        ".*": {"bits": 2, "group_size": 16},
    }
    made = make_quantised(quantise, {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": rules})
    assert len(made.linears) == 10
    made.check_values()
    made.check_tokens()


def test_the_file_that_older_quantisers_write_is_read(make_quantised: MakeQuantised) -> None:
    packer = Packer(8, 16)
    made = make_quantised(packer, None)
    settings = {key: value for key, value in packer.settings.items() if key != "quant_method"}
    digest = FolderSource(made.folder).digest
    (made.folder / "quantize_config.json").write_text(json.dumps(settings))
    made.check_values()
    assert FolderSource(made.folder).digest != digest


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["whole layers", "parts of layers"])
def test_stages_of_layers_draw_the_same_tokens(num_ranks: int, make_quantised: MakeQuantised) -> None:
    packer = PACKERS["4 bits, asymmetric, desc_act"]
    make_quantised(packer, packer.settings).check_tokens(num_ranks, pipeline_parallel_size=2)


def test_words_of_codes_are_not_torn(make_quantised: MakeQuantised) -> None:
    """Of 3 bits 32 codes are stored as one, and two ranks would have 48 each; with whole experts none are cut."""
    packer = PACKERS["3 bits, desc_act"]
    folder = make_quantised(packer, packer.settings).folder
    with pytest.raises(InvalidConfig, match=r"96 feed-forward columns, .* even, in whole blocks of codes; use 1$"):
        build_engine(EngineConfig(model=str(folder), tensor_parallel_size=2, max_model_len=32))
    make_quantised(packer, packer.settings, num_experts=2).check_tokens(2, expert_parallel=True)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"], ids=["codes", "dense"])
def test_a_part_of_another_size_is_refused(name: str, make_quantised: MakeQuantised) -> None:
    source = FolderSource(make_quantised(PACKERS["4 bits"], PACKERS["4 bits"].settings).folder)
    with pytest.raises(CorruptModelFile, match=f"{name}.*expected 95 rows, found shape"):
        list(source.weights(lambda found: Cut(0, 0, 5, 95) if found == name else None))


def test_auto_round_has_the_same_layout_under_its_own_settings(make_quantised: MakeQuantised) -> None:
    packers = {"up": Packer(8), "rest": Packer(4)}

    def quantise(name: str, weight: Tensor) -> Packed | None:
        return None if "0.mlp.down_proj" in name else packers["up" if "up_proj" in name else "rest"](name, weight)

    own = {f"model.layers.{layer}.mlp.up_proj": {"bits": 8} for layer in range(2)}
    own["model.layers.0.mlp.down_proj"] = {"bits": 16}
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    made = make_quantised(quantise, settings | {"sym": True, "iters": 200, "extra_config": own})
    assert len(made.linears) == 13
    made.check_values()
    made.check_tokens()


def test_damaged_files_of_auto_round_end_in_typed_errors(make_quantised: MakeQuantised) -> None:
    own = {"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 32}}
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    make_quantised(Packer(), settings | {"sym": True, "iters": 200, "extra_config": own}).check_mutations()


def open_with(make_quantised: MakeQuantised, **settings: Any) -> None:
    """Open a checkpoint whose settings are changed after packing, and read all of it."""
    packer = Packer()
    folder = make_quantised(packer, {**packer.settings, **settings}).folder
    list(FolderSource(folder).weights())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, r"config.json: quantization_config: bits 5 is not supported; these are: 2, 3, 4, 8"),
        ({"bits": None}, r"bits: expected one of 2, 3, 4, 8, found nothing"),
        ({"group_size": 0}, r"group_size: expected a number of inputs, or -1 for all, found 0"),
        ({"group_size": True}, r"group_size: expected a number of inputs, or -1 for all, found True"),
        ({"sym": "no"}, r"sym: expected true or false, found 'no'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin' is not supported; these are: gptq, gptq_v2"),
        ({"quant_method": "aqlm"}, r"quant_method 'aqlm' is not supported; these are: .*gptq"),
        ({"sparse": 2}, r"key 'sparse' \(here 2\) is not known, and may change what the weights mean"),
        ({"dynamic": {"(": {}}}, r"dynamic: expected a regular expression, found '\('"),
        ({"dynamic": []}, r"dynamic: expected an object, found \[\]"),
        ({"dynamic": {"-:.*mlp": {}}}, r"dynamic: '.\*mlp' leaves 'model.layers.0.mlp.\w+' as it is, but"),
        (
            {"group_size": 16},
            r"model.safetensors: tensor 'model.layers.\S+.scales': expected shape \[6, 64\], found \[3",
        ),
        ({"bits": 8}, r"tensor 'model.layers.\S+.scales': expected shape \[2, 64\], found \[3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_wrong_are_named(
    settings: dict[str, Any], message: str, make_quantised: MakeQuantised
) -> None:
    with pytest.raises((UnsupportedModel, CorruptModelFile), match=message):
        open_with(make_quantised, **settings)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", lambda t: t.fill_(float("nan")), "expected finite numbers, found NaN or infinity"),
        ("scales", lambda t: t.to(torch.int16), r"expected dtype torch.float32 or .*, found torch.int16"),
        ("qzeros", lambda t: t[:1], r"expected shape \[3, 8\], found \[1, 8\]"),
        ("qzeros", lambda t: None, r"expected tensor '\S+down_proj.qzeros' beside \S+down_proj.g_idx, .*, found none"),
        ("qweight", lambda t: t.long(), "expected dtype torch.int32, found torch.int64"),
        ("qweight", lambda t: t[:0], r"expected a shape \[rows, columns\], found \[0, 64\]"),
        ("g_idx", lambda t: t + 1, r"expected groups from 0 to 2, found \[1, 3\]"),
    ],
    ids=["NaN", "integer scales", "too few zeros", "no zeros", "wide codes", "no codes", "groups beyond"],
)
def test_tensors_that_do_not_fit_are_named(
    part: str, change: Callable[[Tensor], Tensor | None], message: str, make_quantised: MakeQuantised
) -> None:
    packer = Packer()

    def quantise(name: str, weight: Tensor) -> Packed | None:
        made = packer(name, weight)
        if made is not None and name.endswith("0.mlp.down_proj"):
            changed = change(made[0].pop(part))
            made[0].update({} if changed is None else {part: changed})
        return made

    folder = make_quantised(quantise, packer.settings).folder
    with pytest.raises(CorruptModelFile, match=f"model.safetensors: .*{message}"):
        list(FolderSource(folder).weights())
