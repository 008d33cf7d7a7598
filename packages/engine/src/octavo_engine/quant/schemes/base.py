"""Scheme: how a checkpoint's quantised linears are stored; StoredLinear: the tensors that a file has of one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile
from octavo_engine.weights.quantized import QuantizedTensor


class Scheme(Protocol):
    """A format of quantised checkpoints, read from its configuration.

    `parts` are the last parts of the names of tensors that a quantised linear may have, such as `qweight`; a linear is
    quantised if it has one of them other than `weight`. `ignored` are the last parts of the names of tensors that say
    nothing of weights, such as scales of activations.
    """

    parts: Collection[str]
    ignored: Collection[str]

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight.

        Raises:
            CorruptModelFile: if a tensor is missing, or of another shape or dtype than it must have; names it.
            UnsupportedModel: if the format is one that we cannot run.
        """
        ...


class StoredLinear:
    """The tensors of one quantised linear by the last part of their names.

    Args:
        name: of the module, such as `model.layers.0.mlp.up_proj`.
        names: the full name of each part that the checkpoint has.
        read: reads a tensor by its full name.
        path_of: says which file a tensor is in.
        metadata: what else the files say, by key.
    """

    def __init__(
        self,
        name: str,
        names: Mapping[str, str],
        read: Callable[[str], Tensor],
        path_of: Callable[[str], object],
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._names = names
        self._read = read
        self._path_of = path_of
        self._metadata = metadata

    def __contains__(self, part: str) -> bool:
        """Return whether the checkpoint has a part."""
        return part in self._names

    @property
    def path(self) -> object:
        """The file that its first part is in."""
        return self._path_of(next(iter(self._names.values())))

    def described(self, part: str) -> Mapping[str, Any]:
        """Return the object that the files' metadata has, as JSON, of a part by its full name."""
        key = f"{self.name}.{part}"
        text = self._metadata.get(key)
        try:
            found = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CorruptModelFile(f"{self.path}: metadata of {key!r}: expected a JSON object, found {text!r}")
        return found

    def matrix(self, part: str, *dtypes: torch.dtype) -> Tensor:
        """Return a tensor with two dimensions, neither of them empty."""
        tensor = self.tensor(part, *dtypes)
        if tensor.dim() != 2 or not tensor.numel():
            self.corrupt(part, "a shape [rows, columns]", list(tensor.shape))
        return tensor

    def tensor(self, part: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor, contiguous, of one of these dtypes and of this shape, if any are given."""
        if part not in self._names:
            names = ", ".join(sorted(self._names.values()))
            raise CorruptModelFile(f"{self.path}: expected tensor '{self.name}.{part}' beside {names}, found none")
        tensor = self._read(self._names[part])
        if dtypes and tensor.dtype not in dtypes:
            self.corrupt(part, "dtype " + " or ".join(map(str, dtypes)), tensor.dtype)
        if shape is not None and tuple(tensor.shape) != shape:
            self.corrupt(part, f"shape {list(shape)}", list(tensor.shape))
        return tensor.contiguous()

    def scales(self, part: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor of finite numbers, of a floating dtype unless some are given."""
        tensor = self.tensor(part, *(dtypes or _FLOATING), shape=shape)
        if not bool(tensor.float().isfinite().all()):
            self.corrupt(part, "finite numbers", "NaN or infinity")
        return tensor

    def powers(self, part: str, shape: tuple[int, int]) -> Tensor:
        """Return a tensor of bytes that stand for 2**(byte - 127), without those that stand for NaN."""
        exponents = self.tensor(part, torch.uint8, shape=shape)
        if int(exponents.max()) == _NAN_POWER:
            self.corrupt(part, "finite scales", f"{_NAN_POWER}, which stands for NaN")
        return exponents

    def corrupt(self, part: str, expected: str, found: object) -> NoReturn:
        """Raise CorruptModelFile for a part."""
        name = self._names[part]
        raise CorruptModelFile(f"{self._path_of(name)}: tensor {name!r}: expected {expected}, found {found}")


_NAN_POWER = 255
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def divided(size: int, group_size: int | None) -> int:
    """Return how many groups so many inputs make; None is one group of all."""
    return 1 if group_size is None else -(-size // group_size)


def groups_of_inputs(
    linear: StoredLinear, part: str, in_features: int, group_size: int | None, num_groups: int
) -> Tensor | None:
    """Return the group of every input out of a part that need not be there; None where they stand in their order."""
    if part not in linear or group_size is None:
        return None
    groups = linear.tensor(part, torch.int32, torch.int64, shape=(in_features,)).long()
    if torch.equal(groups, torch.arange(in_features) // group_size):
        return None
    if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
        linear.corrupt(part, f"groups from 0 to {num_groups - 1}", [int(groups.min()), int(groups.max())])
    return groups
