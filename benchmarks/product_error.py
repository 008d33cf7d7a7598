"""How far products in full are from the true ones: of packed weights, of the same values as fp32 chains, and by torch.

    python benchmarks/product_error.py --out benchmarks/results/product_error

Some weights of the demo model, as stored, by 64 rows of inputs: normally distributed, such with two inputs that are 300
and 50 times as large (outliers), and such whose magnitudes vary by powers of e (heavy). `packed` is what mode `exact`
computes, `chain` a product by the same values packed as float32. The truth is float64. Errors are root mean squares, as
shares of the product's own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo_engine.weights.gguf import GGUFFile
from octavo_engine.weights.locate import locate_model
from octavo_kernels import WeightFormat, cpu_isa, pack_weight, packed_linear, unpack_weight

NAMES = ("blk.0.attn_q.weight", "blk.10.ffn_down.weight", "blk.20.ffn_up.weight", "token_embd.weight")
NUM_ROWS, MAX_OUTPUTS = 64, 2048


@dataclass(frozen=True)
class Figure:
    """Errors of one weight with one kind of inputs."""

    weight: str
    format: str
    inputs: str
    packed: float
    chain: float
    torch: float

    def __str__(self) -> str:
        ratios = f"{self.packed / self.chain:.2f} x chain's, {self.packed / self.torch:.2f} x torch's"
        return f"{self.weight:24} {self.format}  {self.inputs:9} {self.packed:.2e}  {ratios}"


def inputs_of(kind: str, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS, in_features, generator=generator)
    if kind == "outliers":
        x[:, 5] *= 300
        x[:, 77] *= 50
    if kind == "heavy":
        x *= torch.exp(2 * torch.randn(NUM_ROWS, in_features, generator=generator))
    return x


def measure(file: GGUFFile, name: str, kind: str) -> Figure:
    info = file.tensors[name]
    in_features = info.shape[-1]
    weight_format = WeightFormat(info.type.name.lower())
    rows = torch.from_numpy(file.raw(name).copy()).view(info.shape[0], -1)[:MAX_OUTPUTS].contiguous()
    weight = pack_weight(rows, weight_format, in_features=in_features)
    values = unpack_weight(weight)
    chain = pack_weight(values, WeightFormat.F32, in_features=in_features)
    x = inputs_of(kind, in_features)
    truth = x.double() @ values.double().T

    def error(product: Tensor) -> float:
        return float((product - truth).norm() / truth.norm())

    errors = (error(packed_linear(x, weight)), error(packed_linear(x, chain)), error(x @ values.T))
    return Figure(name, weight_format.value, kind, *errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; the demo model if left out")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    args = parser.parse_args()
    file = GGUFFile(locate_model(args.model))
    figures = [measure(file, name, kind) for name in NAMES for kind in ("normal", "outliers", "heavy")]
    for figure in figures:
        print(figure)
    if args.out is not None:
        result = {"isa": cpu_isa(), "figures": [asdict(figure) for figure in figures]}
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
