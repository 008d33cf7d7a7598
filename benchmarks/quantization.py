"""Perplexity of a model with its linears in every form that we make or multiply, beside Transformers in fp32.

    octavo quantize --out /tmp/gptq --text text.txt
    python benchmarks/quantization.py --folders gptq=/tmp/gptq --out benchmarks/results/quantization
    python benchmarks/quantization.py --only Q5_0 int8 --out benchmarks/results/quantization

All start from the float32 values of one model; only its linears differ. The text is that of `perplexity.py`, which
nothing was calibrated on. GGUF's types are quantised by the gguf package: those that it can only read, and those
whose blocks do not divide the model's inputs, are named and left out. What `--only` leaves out keeps what the
JSON has of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from perplexity import Score, transformers
from workload import english_ids

from octavo_engine.models.registry import Model
from octavo_engine.quant.calibrate.perplexity import perplexity
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import Weight, load_model
from octavo_engine.weights.source import Source, open_source
from octavo_engine.weights.stored import StoredTensor

ONLINE = ("int8", "int4")


class OtherWeights:
    """A source whose linears come otherwise: `change` gets their float32 values."""

    def __init__(self, source: Source, change: Callable[[torch.Tensor], Weight]) -> None:
        self.name, self.config, self.num_weights = source.name, source.config, source.num_weights
        self.is_quantized = False
        self._source = source
        self._change = change

    def weights(self) -> Iterator[tuple[str, Weight]]:
        for name, weight in self._source.weights():
            values = weight.float() if isinstance(weight, torch.Tensor) else weight.values()
            yield name, self._change(values) if name.endswith("_proj.weight") else values


def stored_as(tensor_type: TensorType) -> Callable[[torch.Tensor], StoredTensor]:
    """Return what quantises values to one of GGUF's types by the gguf package."""

    def change(values: torch.Tensor) -> StoredTensor:
        rows = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[tensor_type.name])
        return StoredTensor(rows.view("uint8"), tensor_type, tuple(values.shape))

    return change


def divide(source: Source) -> tuple[list[TensorType], list[str], list[str]]:
    """Return GGUF's types that can be made, those that the package only reads, those that do not divide the inputs."""
    sizes = (source.config.hidden_size, source.config.intermediate_size)
    made, only_read, broken = [], [], []
    for tensor_type in TensorType:
        size = tensor_type.block_elements
        if size == 1:
            continue
        if any(inputs % size for inputs in sizes):
            broken.append(tensor_type.name)
            continue
        try:
            stored_as(tensor_type)(torch.ones(1, size))
        except (NotImplementedError, KeyError):
            only_read.append(tensor_type.name)
        else:
            made.append(tensor_type)
    return made, only_read, broken


def contestants(source: Source, folders: dict[str, str], types: list[TensorType]) -> dict[str, Callable[[], Model]]:
    """Return by name what loads each model."""

    def load(other: Any, **options: Any) -> Callable[[], Model]:
        return lambda: load_model(other, **options)

    plain = OtherWeights(source, lambda values: values)
    found = {"float32": load(plain)}
    found |= {item.name: load(OtherWeights(source, stored_as(item))) for item in types}
    found |= {f"online {kind}": load(plain, quantization=kind) for kind in ONLINE}
    return found | {name: load(open_source(path)) for name, path in folders.items()}


def oracle(sequences: list[list[int]], model: str | None) -> float:
    """Return Transformers' perplexity, in fp32 on the dequantised weights."""
    logits, score = transformers("gguf", model), Score()
    for ids in sequences:
        score.add(logits(ids), ids)
    return score.perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; the demo model if left out")
    parser.add_argument("--folders", nargs="*", default=[], help="NAME=FOLDER of quantised checkpoints of the model")
    parser.add_argument("--only", nargs="+", help="contestants to run")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="write OUT.json")
    arguments = parser.parse_args()
    source, size = open_source(arguments.model), arguments.window
    ids = english_ids(arguments.model)
    sequences = [ids[index * size : (index + 1) * size] for index in range(arguments.windows)]
    types, only_read, broken = divide(source)
    path = arguments.out.with_suffix(".json")
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"perplexity": {}}
    document |= {"window": size, "windows": len(sequences), "only_read": only_read, "blocks_do_not_divide": broken}
    found = document["perplexity"]
    if arguments.only is None or "transformers" in arguments.only:
        found["transformers"] = oracle(sequences, arguments.model)
    for name, load in contestants(source, dict(item.split("=", 1) for item in arguments.folders), types).items():
        if arguments.only is None or name in arguments.only:
            found[name] = perplexity(load(), sequences)
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{name:16} {found[name]:9.4f}", flush=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    if "transformers" in found:
        for name, value in found.items():
            print(f"{name:16} {value:9.4f}  {value / found['transformers'] - 1:+8.2%}")


if __name__ == "__main__":
    main()
