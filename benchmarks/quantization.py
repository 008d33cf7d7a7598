"""Perplexity of a model with its linears in every form that we make or multiply, beside Transformers in fp32.

    python benchmarks/calibration_text.py --out /tmp/text
    octavo quantize --out /tmp/gptq --text /tmp/text/calibration.txt
    python benchmarks/quantization.py --folders gptq=/tmp/gptq --out benchmarks/results/quantization
    python benchmarks/quantization.py --only Q5_0 int8 --out benchmarks/results/quantization

All start from the float32 values of one model; only its linears differ, and in the last rows the KV cache. The text is
that of `perplexity.py`, which nothing was calibrated on. GGUF's types are quantised by the gguf package, those that it
can only read by `gguf_blocks.py`; types whose blocks do not divide the model's inputs are named and left out. Of
folders the JSON keeps how they were made. What `--only` leaves out keeps what the JSON has of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf_blocks import quantize_blocks
from perplexity import Logits, Score, octavo, transformers
from workload import english_ids

from octavo_engine.models.registry import Model
from octavo_engine.quant.calibrate.perplexity import perplexity
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import Weight, load_model
from octavo_engine.weights.source import Source, open_source
from octavo_engine.weights.stored import StoredTensor

ONLINE = ("int8", "int4")
KV_DTYPES = ("int8",)
BY_ITSELF = ("IQ4_NL", "NVFP4")  # types of `gguf_blocks`


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
    """Return what quantises values to one of GGUF's types."""

    def change(values: torch.Tensor) -> StoredTensor:
        if tensor_type.name in BY_ITSELF:
            rows = quantize_blocks(values.numpy(), tensor_type.name)
        else:
            rows = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[tensor_type.name])
        return StoredTensor(rows.view("uint8"), tensor_type, tuple(values.shape))

    return change


def divide(source: Source) -> tuple[list[TensorType], list[str]]:
    """Return GGUF's block types whose blocks divide the model's inputs, and the names of the others."""
    sizes = (source.config.hidden_size, source.config.intermediate_size)
    blocks = [tensor_type for tensor_type in TensorType if tensor_type.block_elements > 1]
    made = [item for item in blocks if not any(inputs % item.block_elements for inputs in sizes)]
    return made, [item.name for item in blocks if item not in made]


def contestants(source: Source, folders: dict[str, str], types: list[TensorType]) -> dict[str, Callable[[], Model]]:
    """Return by name what loads each model."""

    def load(other: Any, **options: Any) -> Callable[[], Model]:
        return lambda: load_model(other, **options)

    plain = OtherWeights(source, lambda values: values)
    found = {"float32": load(plain)}
    found |= {item.name: load(OtherWeights(source, stored_as(item))) for item in types}
    found |= {f"online {kind}": load(plain, quantization=kind) for kind in ONLINE}
    return found | {name: load(open_source(path)) for name, path in folders.items()}


def score(logits: Logits, sequences: list[list[int]]) -> float:
    """Return the perplexity of what gives logits, sequence by sequence."""
    scores = Score()
    for ids in sequences:
        scores.add(logits(ids), ids)
    return scores.perplexity


def measurements(
    source: Source, folders: dict[str, str], sequences: list[list[int]], model: str | None
) -> dict[str, Callable[[], float]]:
    """Return by name what measures each contestant."""

    def of_model(load: Callable[[], Model]) -> Callable[[], float]:
        return lambda: perplexity(load(), sequences)

    def of_kv(kind: str) -> Callable[[], float]:
        return lambda: score(octavo(model, f"exact/{kind}", len(sequences[0])), sequences)

    found: dict[str, Callable[[], float]] = {
        "transformers": lambda: score(transformers("gguf", model), sequences),
    }
    types, _ = divide(source)
    found |= {name: of_model(load) for name, load in contestants(source, folders, types).items()}
    return found | {f"KV {kind}": of_kv(kind) for kind in KV_DTYPES}


def made_how(folder: str, command: str) -> dict[str, Any]:
    """Return what a folder says of how it was quantised, and the command that did."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return {"command": command, "quantization_config": config["quantization_config"]}


def plot(found: dict[str, float], path: Path) -> None:
    import matplotlib.pyplot as plt

    base = found["transformers"]
    names = [name for name in found if name != "transformers"]
    losses = [round(100 * (found[name] / base - 1), 2) + 0.0 for name in names]  # no -0.00
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.bar_label(axes.barh(names[::-1], losses[::-1]), fmt="%.2f", padding=3, fontsize=8)
    axes.set(xlabel="% more perplexity than Transformers in float32", title="What rounding linears costs")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def pairs(items: list[str]) -> dict[str, str]:
    return dict(item.split("=", 1) for item in items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="GGUF file; the demo model if left out")
    parser.add_argument("--folders", nargs="*", default=[], help="NAME=FOLDER of quantised checkpoints of the model")
    parser.add_argument("--commands", nargs="*", default=[], help="NAME=COMMAND that wrote the folder, for the record")
    parser.add_argument("--only", nargs="+", help="contestants to run")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    source, size = open_source(arguments.model), arguments.window
    ids = english_ids(arguments.model)
    sequences = [ids[index * size : (index + 1) * size] for index in range(arguments.windows)]
    folders, commands = pairs(arguments.folders), pairs(arguments.commands)
    path = arguments.out.with_suffix(".json")
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"perplexity": {}, "folders": {}}
    types, broken = divide(source)
    document |= {"window": size, "windows": len(sequences), "blocks_do_not_divide": broken}
    document["gguf_bits_per_weight"] = {item.name: 8 * item.block_bytes / item.block_elements for item in types}
    todo = measurements(source, folders, sequences, arguments.model)
    known = document["perplexity"]
    for name, measure in todo.items():
        if arguments.only is None or name in arguments.only:
            known[name] = measure()
            if name in folders:
                document["folders"][name] = made_how(folders[name], commands.get(name, ""))
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{name:16} {known[name]:9.4f}", flush=True)
    order = [*todo, *(name for name in known if name not in todo)]
    document["perplexity"] = found = {name: known[name] for name in order if name in known}
    path.write_text(json.dumps(document, indent=1) + "\n")
    if "transformers" in found:
        for name, value in found.items():
            print(f"{name:16} {value:9.4f}  {value / found['transformers'] - 1:+8.2%}")
        plot(found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
