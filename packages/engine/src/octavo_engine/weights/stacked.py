"""StackedMatrix: a matrix in a tensor with three dimensions, as the experts of a layer are stored."""

from __future__ import annotations

import re
from typing import NamedTuple

from octavo_engine.errors import CorruptModelFile
from octavo_engine.weights.cut import Shape

_HF = re.compile(r"(model\.layers\.\d{1,5})\.mlp\.experts\.(gate_up_proj|down_proj)")
_GGUF = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|gate_up|down)_exps\.weight")
_PARTS = {"gate": ("w1",), "up": ("w3",), "gate_up": ("w1", "w3"), "down": ("w2",)}
_HF_ROUTER = re.compile(r"(model\.layers\.\d{1,5})\.mlp\.gate\.weight")


class StackedMatrix(NamedTuple):
    """One of the matrices in a tensor.

    name: under which it comes. place: of it along the first dimension. part: which of `num_parts` equal runs of rows
    it is, where several matrices lie on top of each other.
    """

    name: str
    place: int
    part: int
    num_parts: int

    def rows(self, tensor: str, shape: Shape, num_matrices: int, where: str) -> slice:
        """Return its rows along the second dimension of a tensor of `shape`.

        Raises:
            CorruptModelFile: the tensor is no stack of so many matrices; names it.
        """
        if len(shape) != 3 or shape[0] != num_matrices or not shape[1] or shape[1] % self.num_parts:
            each = "rows" if self.num_parts == 1 else f"{self.num_parts} x rows"
            raise CorruptModelFile(
                f"{where}: tensor {tensor!r}: expected shape [{num_matrices} experts, {each}, columns], "
                f"found {list(shape)}"
            )
        num_rows = shape[1] // self.num_parts
        return slice(self.part * num_rows, (self.part + 1) * num_rows)


def hf_stack(name: str, num_experts: int) -> list[StackedMatrix]:
    """Return the matrices in a tensor of a Hugging Face folder by its name, as Mixtral's experts are published.

    Transformers 5 holds them stacked and can save them so. No matrices: the tensor is not stacked.
    """
    match = _HF.fullmatch(name)
    return [] if match is None else _stack(match[1], match[2].removesuffix("_proj"), num_experts)


def gguf_stack(name: str, num_experts: int) -> list[StackedMatrix]:
    """Return the matrices in a tensor of a GGUF file by its name; none if it is not stacked."""
    match = _GGUF.fullmatch(name)
    return [] if match is None else _stack(f"model.layers.{int(match[1])}", match[2], num_experts)


def hf_router(name: str) -> str:
    """Return the published name of a router that is stored under Transformers 5's own, and other names as they are."""
    return _HF_ROUTER.sub(r"\1.block_sparse_moe.gate.weight", name)


def _stack(layer: str, kind: str, num_experts: int) -> list[StackedMatrix]:
    parts = _PARTS[kind]
    return [
        StackedMatrix(f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight", expert, index, len(parts))
        for expert in range(num_experts)
        for index, part in enumerate(parts)
    ]
