"""bitsandbytes checkpoints against plain statements of their layouts, and through `LLM` against Transformers."""

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

TABLES = {
    "nf4": [
        -1.0,
        -0.6962,
        -0.5251,
        -0.3949,
        -0.2844,
        -0.1848,
        -0.0911,
        0.0,
        0.0796,
        0.1609,
        0.2461,
        0.3379,
        0.4407,
        0.5626,
        0.723,
        1.0,
    ],
    "fp4": [
        0.0,
        0.0052,
        0.6667,
        1.0,
        0.3333,
        0.5,
        0.1667,
        0.25,
        -0.0,
        -0.0052,
        -0.6667,
        -1.0,
        -0.3333,
        -0.5,
        -0.1667,
        -0.25,
    ],
}


class Packer:
    """Rounds weights to 4 bits by a table, per block of 40 values, and stores them."""

    block_size, nested_size, offset = 40, 16, 0.43

    def __init__(self, kind: str, *, nested: bool = False, storage: torch.dtype = torch.uint8) -> None:
        self.kind, self.nested, self.storage = kind, nested, storage
        self.rng = np.random.default_rng(5)
        self.settings = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "_load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": None,
        }

    def absmax(self, largest: np.ndarray[Any, Any], parts: dict[str, Any], state: dict[str, Any]) -> Any:
        """Store the factors of blocks; return what they mean."""
        if not self.nested:
            parts["weight.absmax"] = largest
            return largest
        table = np.sort(self.rng.uniform(-1, 1, 256)).astype(np.float32)
        outer = self.rng.uniform(0.2, 0.4, -(-len(largest) // self.nested_size)).astype(np.float32)
        spread = outer[np.arange(len(largest)) // self.nested_size]
        bytes_ = np.abs(((largest - self.offset) / spread)[:, None] - table).argmin(-1).astype(np.uint8)
        parts |= {"weight.absmax": bytes_, "weight.nested_absmax": outer, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": self.nested_size, "nested_dtype": "float32", "nested_offset": self.offset}
        return table[bytes_] * spread + np.float32(self.offset)

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        table = np.array(TABLES[self.kind], np.float32)
        flat = weight.numpy().ravel()
        of_block = np.arange(len(flat)) // self.block_size
        largest = np.maximum.reduceat(np.abs(flat), np.arange(0, len(flat), self.block_size))
        parts: dict[str, Any] = {"weight.quant_map": table}
        state: dict[str, Any] = {"quant_type": self.kind, "blocksize": self.block_size, "dtype": "float16"}
        state["shape"] = list(weight.shape)
        factors = self.absmax(largest, parts, state)[of_block]
        codes = np.abs((flat / factors)[:, None] - table).argmin(-1)
        parts["weight"] = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{self.kind}"] = np.frombuffer(text, np.uint8).copy()
        stored = {part: torch.from_numpy(array) for part, array in parts.items()}
        stored["weight"] = stored["weight"].flatten().view(self.storage)[:, None]
        return stored, torch.from_numpy((table[codes] * factors).reshape(weight.shape))


class Int8Packer(Packer):
    """Rounds the rows of weights to 8 bits, and stores them."""

    def __init__(self) -> None:
        super().__init__("nf4")
        self.settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}

    def __call__(self, name: str, weight: Tensor) -> Packed | None:
        if name == "lm_head":
            return None
        largest = np.abs(weight.numpy()).max(-1)
        codes = np.rint(weight.numpy() / largest[:, None] * 127).astype(np.int8)
        values = codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
        parts = {"weight": codes, "SCB": largest, "weight_format": np.zeros((), np.uint8)}
        return {part: torch.from_numpy(np.array(array)) for part, array in parts.items()}, torch.from_numpy(values)


PACKERS = {
    "nf4": Packer("nf4"),
    "nf4, double quantisation, stored as bf16": Packer("nf4", nested=True, storage=torch.bfloat16),
    "fp4": Packer("fp4"),
    "int8": Int8Packer(),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_values_are_those_of_the_layout(packer: Packer, make_quantised: MakeQuantised) -> None:
    made = make_quantised(packer, packer.settings)
    assert len(made.linears) == 14
    made.check_values()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["nf4, double quantisation, stored as bf16", "int8"])
def test_tokens_are_those_of_transformers(name: str, num_ranks: int, make_quantised: MakeQuantised) -> None:
    make_quantised(PACKERS[name], PACKERS[name].settings).check_tokens(num_ranks)


@pytest.mark.parametrize("name", ["nf4, double quantisation, stored as bf16", "int8"])
def test_experts_of_a_mixture_stay_in_codes(name: str, make_quantised: MakeQuantised) -> None:
    made = make_quantised(PACKERS[name], PACKERS[name].settings, num_experts=2)
    assert len(made.linears) == 2 * (4 + 2 * 3)
    made.check_values()
    made.check_tokens(2, expert_parallel=True)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_memory_at_rest_is_that_of_the_file(packer: Packer, make_quantised: MakeQuantised) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    make_quantised(packer, packer.settings, **sizes).check_memory()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_damaged_files_end_in_typed_errors(packer: Packer, make_quantised: MakeQuantised) -> None:
    make_quantised(packer, packer.settings).check_mutations()


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_some_rows_are_those_of_the_whole(packer: Packer, make_quantised: MakeQuantised) -> None:
    weights = dict(FolderSource(make_quantised(packer, packer.settings).folder).weights())
    weight = weights["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(weight.values(slice(7, 31)), weight.values()[7:31])


def test_a_row_may_end_within_a_byte(make_quantised: MakeQuantised) -> None:
    from octavo_engine.quant.schemes.bitsandbytes import Table4

    codes = torch.randint(256, (23,), dtype=torch.uint8)  # of 5 x 9 values
    weight = Table4((5, 9), 4, codes, torch.arange(16).float(), torch.ones(12))
    expected = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:45].view(5, 9)
    assert torch.equal(weight.values(), expected.float())
    assert torch.equal(weight.values(slice(1, 4)), expected[1:4].float())


def change_state(**changed: Any) -> Callable[[Tensor], Tensor]:
    def change(stored: Tensor) -> Tensor:
        text = json.dumps({**json.loads(bytes(stored.tolist())), **changed})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    return change


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (STATE, lambda t: t[:-1], "expected JSON, found"),
        (STATE, lambda t: torch.tensor([91, 93], dtype=torch.uint8), r"expected an object, found \[\]"),
        (STATE, change_state(shape=[1 << 40, 1 << 40]), "bytes for the shape"),
        (STATE, change_state(shape=[64]), r"expected a 'shape' \[rows, columns\], found \[64\]"),
        (STATE, change_state(blocksize=0), "expected a size 'blocksize', found 0"),
        (STATE, change_state(nested_offset="x"), "expected a number 'nested_offset', found x"),
        (STATE, change_state(nested_blocksize=1), r"weight.nested_absmax': expected shape \[154\], found \[10\]"),
        ("weight", lambda t: t[:-1], "expected 3072 bytes for the shape"),
        ("weight.quant_map", lambda t: t[:3], r"expected shape \[16\], found \[3\]"),
        ("weight.nested_absmax", lambda t: t * float("nan"), "expected finite numbers, found NaN"),
        ("weight.absmax", lambda t: t.float(), "expected dtype torch.uint8, found torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    part: str, change: Callable[[Tensor], Tensor], message: str, make_quantised: MakeQuantised
) -> None:
    packer = Packer("nf4", nested=True)

    def quantise(name: str, weight: Tensor) -> Packed | None:
        made = packer(name, weight)
        if made is not None and name.endswith("0.mlp.down_proj"):
            made[0][part] = change(made[0][part])
        return made

    folder = make_quantised(quantise, packer.settings).folder
    with pytest.raises(CorruptModelFile, match=f"model.safetensors: tensor 'model.layers.0.mlp.down_proj.*{message}"):
        list(FolderSource(folder).weights())


def test_codes_in_the_order_of_a_gpu_are_refused(make_quantised: MakeQuantised) -> None:
    packer = Int8Packer()

    def quantise(name: str, weight: Tensor) -> Packed | None:
        made = packer(name, weight)
        if made is not None:
            made[0]["weight_format"] += 1
        return made

    folder = make_quantised(quantise, packer.settings).folder
    with pytest.raises(CorruptModelFile, match=r"weight_format': expected 0, codes row after row, found 1"):
        list(FolderSource(folder).weights())
    settings = {**packer.settings, "bnb_4bit_quant_type": "int3"}
    with pytest.raises(UnsupportedModel, match="bnb_4bit_quant_type 'int3' is not supported; these are: nf4, fp4"):
        FolderSource(make_quantised(packer, settings).folder)
