"""Decoding at batch 1 in quantised formats, Hugging Face's and GGUF's, beside float32: tokens per second, and memory.

    python benchmarks/quantized_decoding.py --out benchmarks/results/quantized_decoding
    python benchmarks/quantized_decoding.py --wide --out benchmarks/results/quantized_decoding_wide

The linears of one model are rounded to the nearest code of each format, in groups that divide its inputs; what it says
then does not matter here. Embedding and head stay float32 in all of them, a fifth of the demo model. Blocks of 256
inputs do not divide the demo model: `--wide` takes random weights for as many layers a third wider, and random blocks
of those of GGUF's types that the gguf package can only read. All formats are in one process and compute a token each
in turn, so that what else the machine does falls on all alike; figures are medians over steps. `memory` is what the
linears take beside their bytes in a file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantization import stored_as
from step_profile import submit
from torch import Tensor

from octavo_engine import EngineConfig
from octavo_engine.assembly import Place, assemble
from octavo_engine.models.config import ModelConfig
from octavo_engine.numerics import resolve_numerics
from octavo_engine.opening import opening
from octavo_engine.quant.choose import choose_method
from octavo_engine.quant.schemes.bitsandbytes import RowBytes, Table4
from octavo_engine.quant.schemes.gptq import GPTQTensor
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import E2M1, Float4, ScaledFloats
from octavo_engine.weights.source import Source, open_source
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import GroupedWeight, PackedWeight, WeightFormat
from octavo_kvcache.storage import KVStorage

Change = Callable[[Tensor], Tensor | QuantizedTensor | StoredTensor]
_BELOW = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
_ABOVE = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1)
NF4 = torch.tensor([*_BELOW, 0, *_ABOVE])
E2M1_LEVELS = torch.tensor([*E2M1, *(-value for value in E2M1)])
TARGET_SPEED, TARGET_MEMORY = 2.0, 1.05
WARM_STEPS = 3  # the prompt's, and two more
WIDER = {576: 768, 1536: 2048, 192: 256}  # the demo model's sizes: hidden, intermediate, of keys and values


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the code of the nearest level: uint8."""
    in_order, codes = levels.sort()
    return codes[torch.bucketize(values, (in_order[1:] + in_order[:-1]) / 2)].to(torch.uint8)


def integers(values: Tensor, *, group: int = 64, shuffled: bool = False) -> GPTQTensor:
    """Round to 4 bits with zeros, as GPTQ stores them."""
    out_features, in_features = values.shape
    groups = torch.arange(in_features) // group
    if shuffled:
        order = torch.randperm(in_features)
        groups, values = groups[order.argsort()], values[:, order]
    grouped = values.view(out_features, -1, group)
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((most - least) / 15).clamp(min=1e-6).half()
    zeros = (-least / scales).round().clamp(0, 15)
    codes = ((grouped / scales[..., None].float()).round() + zeros[..., None]).clamp(0, 15).int().flatten(1)
    if shuffled:
        codes = codes[:, order.argsort()]
    words = torch.zeros(in_features // 8, out_features, dtype=torch.int32)
    for place in range(8):
        words |= codes.T[place::8] << (4 * place)
    kept_groups = groups if shuffled else None
    zeros = zeros.T.to(torch.int16).contiguous()
    return GPTQTensor(
        shape=(out_features, in_features),
        bits=4,
        group_size=group,
        scales=scales.T.contiguous(),
        zeros=zeros,
        zero_point=8,
        groups=kept_groups,
        words=words,
    )


def nf4(values: Tensor, *, nested: bool) -> Table4:
    """Round to nf4 in blocks of 64, whose factors are bytes if nested."""
    blocks = values.reshape(-1, 64)
    absmax = blocks.abs().amax(-1).clamp(min=1e-9)
    codes = nearest(blocks / absmax[:, None], NF4).flatten()
    stored = codes[::2] << 4 | codes[1::2]
    shape = (values.shape[0], values.shape[1])
    if not nested:
        return Table4(shape, 64, stored, NF4, absmax)
    table, outer = torch.linspace(0, 1, 256), torch.full((-(-len(absmax) // 256),), float(absmax.max()))
    return Table4(shape, 64, stored, NF4, nearest(absmax / outer[0], table), 256, table, outer, 0.0)


def mxfp4(values: Tensor) -> Float4:
    """Round to 4-bit floats by powers of two for 32 inputs."""
    grouped = values.view(len(values), -1, 32)
    powers = (grouped.abs().amax(-1).clamp(min=1e-9) / 6).log2().ceil().clamp(-126, 127)
    codes = nearest(grouped / torch.exp2(powers)[..., None], E2M1_LEVELS).flatten(1)
    return Float4(
        (values.shape[0], values.shape[1]), 32, codes[:, ::2] | codes[:, 1::2] << 4, (powers + 127).to(torch.uint8)
    )


def nvfp4(values: Tensor) -> Float4:
    """Round to 4-bit floats by scales in E4M3 for 16 inputs, and one divisor for all."""
    grouped = values.view(len(values), -1, 16)
    divisor = 6 * 448 / values.abs().max()
    scales = (grouped.abs().amax(-1) / 6 * divisor).clamp(min=2**-6).to(torch.float8_e4m3fn)
    codes = nearest(grouped / (scales.float() / divisor)[..., None], E2M1_LEVELS).flatten(1)
    stored = codes[:, ::2] | codes[:, 1::2] << 4
    return Float4((values.shape[0], values.shape[1]), 16, stored, scales, divisor=divisor.view(1))


def fp8(values: Tensor) -> ScaledFloats:
    """Round to E4M3 by channel."""
    scales = values.abs().amax(-1, keepdim=True) / 448
    shape = (values.shape[0], values.shape[1])
    return ScaledFloats(shape, (values / scales).to(torch.float8_e4m3fn), scales, (1, values.shape[1]))


def int8(values: Tensor) -> RowBytes:
    """Round to bitsandbytes' int8."""
    largest = values.abs().amax(-1)
    codes = (values / largest[:, None] * 127).round().to(torch.int8)
    return RowBytes((values.shape[0], values.shape[1]), codes, largest)


def gguf_type(name: str) -> Change:
    """Return what makes random blocks of one of GGUF's types; every scale in them is small and finite."""
    tensor_type = TensorType[name]

    def change(values: Tensor) -> StoredTensor:
        num_bytes = values.shape[1] // tensor_type.block_elements * tensor_type.block_bytes
        rows = torch.randint(0x10, 0x30, (len(values), num_bytes), dtype=torch.uint8)
        return StoredTensor(rows.numpy(), tensor_type, (values.shape[0], values.shape[1]))

    return change


FORMATS: dict[str, tuple[int, Change]] = {  # bits of a code, and what rounds
    "float32": (32, lambda values: values),
    "GPTQ, groups of 64, zeros": (4, integers),
    "GPTQ, groups of 32, zeros": (4, partial(integers, group=32)),
    "GPTQ, groups of 64, desc_act": (4, partial(integers, shuffled=True)),
    "nf4": (4, partial(nf4, nested=False)),
    "nf4, double quantisation": (4, partial(nf4, nested=True)),
    "MXFP4": (4, mxfp4),
    "NVFP4": (4, nvfp4),
    "FP8 by channel": (8, fp8),
    "int8 of bitsandbytes": (8, int8),
    **{f"GGUF {name}": (4, stored_as(TensorType[name])) for name in ("Q4_0", "Q4_1", "IQ4_NL", "MXFP4", "NVFP4")},
    "GGUF Q8_0": (8, stored_as(TensorType.Q8_0)),
}
WIDE_FORMATS: dict[str, tuple[int, Change]] = {  # of blocks of 256
    "GGUF Q4_K": (4, gguf_type("Q4_K")),
    "GGUF IQ4_XS": (4, gguf_type("IQ4_XS")),
    "GGUF Q5_K": (5, gguf_type("Q5_K")),
    "GGUF Q6_K": (6, gguf_type("Q6_K")),
}


def wider(config: ModelConfig, values: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the demo model's layers a third wider, with random weights."""
    config = replace(
        config,
        hidden_size=WIDER[config.hidden_size],
        intermediate_size=WIDER[config.intermediate_size],
        num_heads=WIDER[config.hidden_size] // config.head_dim,
        num_kv_heads=WIDER[config.num_kv_heads * config.head_dim] // config.head_dim,
    )
    shapes = {name: [WIDER.get(size, size) for size in tensor.shape] for name, tensor in values.items()}
    return config, {name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}


class Rounded:
    """A source whose linears come in a format; what it lacks is the other source's.

    config: its sizes. values: its weights by name, in float32.
    """

    def __init__(self, source: Source, config: ModelConfig, values: dict[str, Tensor], change: Change) -> None:
        self._source, self._values, self._change = source, values, change
        self.config = config
        self.is_quantized = True
        self.file_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Yield float32 values, those of linears rounded."""
        for name, values in self._values.items():
            changed = self._change(values) if name.endswith("_proj.weight") else values
            if isinstance(changed, StoredTensor):
                self.file_bytes += changed.rows.nbytes
            elif isinstance(changed, QuantizedTensor):
                self.file_bytes += in_file(changed)
            yield name, changed


def in_file(weight: QuantizedTensor) -> int:
    """Return the bytes of a linear in a file: zeros have as many bits as codes, and orders 32."""
    if not isinstance(weight, GPTQTensor):
        return weight.num_bytes
    assert weight.zeros is not None
    order = 0 if weight.groups is None else 4 * weight.shape[1]
    return weight.words.nbytes + weight.scales.nbytes + weight.zeros.numel() * weight.bits // 8 + order


class Contestant:
    """An engine on a model in a format, with one sequence to decode.

    Attributes:
        memory: of its linears beside their bytes in a file; None for float32.
        seconds: of its steps so far.
    """

    def __init__(self, source: Rounded, num_steps: int) -> None:
        config = EngineConfig(max_num_seqs=2, num_blocks=64)
        numerics = resolve_numerics(config, source.config)
        method = choose_method(numerics.device, numerics.dtype)
        make_model = partial(load_model, device=numerics.device, dtype=numerics.dtype, quant=method)
        before = packed_bytes()
        other: Any = source
        with opening(other) as opened:
            self._built = assemble(config, opened, numerics, Place(make_model, KVStorage), None, time.monotonic())
        self._streams = submit(self._built, 1, num_steps)
        self.memory = (packed_bytes() - before) / source.file_bytes if source.file_bytes else None
        self.seconds: list[float] = []

    def step(self) -> None:
        """Compute one token."""
        started = time.perf_counter()
        for one in self._built.engine.step():
            self._streams[one.request_id].push(one)
        self.seconds.append(time.perf_counter() - started)


def packed_bytes() -> int:
    """Return the bytes of all quantised weights that there are."""
    gc.collect()
    weights = (item for item in gc.get_objects() if type(item) in (GroupedWeight, PackedWeight))
    return sum(item.num_bytes for item in weights if getattr(item, "format", None) is not WeightFormat.F32)


def as_float32(weight: Any) -> Tensor:
    """Return a weight's values."""
    values: Tensor = weight.float() if isinstance(weight, Tensor) else weight.values()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; the demo model if left out")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--wide", action="store_true", help="layers a third wider, of random weights")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS | WIDE_FORMATS), metavar="FORMAT")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    config, values = source.config, {name: as_float32(weight) for name, weight in source.weights()}
    formats = FORMATS
    if arguments.wide:
        config, values = wider(config, values)
        formats = FORMATS | WIDE_FORMATS
    contestants = {}
    for name in dict.fromkeys(["float32", *(arguments.formats or formats)]):
        rounded = Rounded(source, config, values, formats[name][1])
        contestants[name] = Contestant(rounded, arguments.steps + WARM_STEPS)
        print(f"made {name}", flush=True)
    for _ in range(arguments.steps + WARM_STEPS):
        for contestant in contestants.values():
            contestant.step()
    steps = {name: item.seconds[WARM_STEPS:] for name, item in contestants.items()}
    plain = statistics.median(steps["float32"])
    rows = []
    for name, taken in steps.items():
        step, held, bits = statistics.median(taken), contestants[name].memory, formats[name][0]
        row = {"format": name, "bits": bits, "step_ms": 1000 * step, "tokens_per_s": 1 / step}
        rows.append({**row, "times_float32": plain / step, "memory": held})
        kept = verdict = ""
        if held is not None:
            kept = f"  memory {held:.3f} of the file"
            met = plain / step >= TARGET_SPEED and held <= TARGET_MEMORY
            verdict = "" if bits > 4 else "  (targets met)" if met else "  (targets NOT met)"
        print(f"{name:30} {1 / step:7.1f} tokens/s  {plain / step:5.2f} x float32{kept}{verdict}")
    if arguments.out:
        document = {"torch": torch.__version__, "num_threads": torch.get_num_threads(), "rows": rows}
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
