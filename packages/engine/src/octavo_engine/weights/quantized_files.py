"""QuantizedFiles: a folder's weights in which every quantised linear comes as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from octavo_engine.quant.schemes.base import Scheme, StoredLinear
from octavo_engine.weights.cut import CutRule, Keep, keep_all, read_whole
from octavo_engine.weights.files import SafetensorsFiles
from octavo_engine.weights.quantized import QuantizedTensor


class QuantizedFiles:
    """The weights of safetensors files whose linears a scheme reads.

    What a linear is stored in is found by the names in the files' headers, so its tensors may lie in several files.
    `num_weights` is the number of weights that come, with a linear as one.
    """

    def __init__(self, files: SafetensorsFiles, scheme: Scheme) -> None:
        self._files = files
        self._scheme = scheme
        names = [name for name in files.names if name.rpartition(".")[2] not in scheme.ignored]
        self._linears = _linears(names, scheme)
        taken = {name for parts in self._linears.values() for name in parts.values()}
        self._others = [name for name in names if name not in taken]
        self._names = {linear: f"{linear}.weight" for linear in self._linears}
        self.num_weights = len(self._linears) + len(self._others)

    def read(self, cut: CutRule = read_whole, keep: Keep = keep_all) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yield the part that a rule names of every weight that is kept: those not quantised, then the linears."""
        with self._files.open() as read:
            for name in filter(keep, self._others):
                tensor = read(name)
                if (part := cut(name)) is not None:
                    part.check(name, tuple(tensor.shape), str(self._files.path_of(name)))
                    tensor = part.part(tensor)
                yield name, tensor
            for linear, name in self._names.items():
                if keep(name):
                    whole = self._linear(linear, read)
                    if (part := cut(name)) is not None:
                        part.check(name, whole.shape, str(self._files.folder))
                    yield name, whole if part is None else whole.part(part)

    def num_bytes(self) -> dict[str, int]:
        """Return how many bytes each weight takes in the files, by its name."""
        of_tensor = self._files.num_bytes
        num_bytes = {name: of_tensor[name] for name in self._others}
        for linear, name in self._names.items():
            num_bytes[name] = sum(of_tensor[part] for part in self._linears[linear].values())
        return num_bytes

    def column_block(self, name: str) -> int:
        """Return how many columns of a weight are stored as one."""
        linear = name.removesuffix(".weight")
        if linear not in self._linears:
            return 1
        with self._files.open() as read:
            return self._linear(linear, read).column_block

    def _linear(self, name: str, read: Callable[[str], Tensor]) -> QuantizedTensor:
        """Return a linear, which is read as it is used: what is cut off it is not."""
        parts = self._linears[name]
        return self._scheme.read(StoredLinear(name, parts, read, self._files.path_of, self._files.metadata))


def _linears(names: list[str], scheme: Scheme) -> dict[str, dict[str, str]]:
    """Return by linear the names of its parts."""
    found: dict[str, dict[str, str]] = {}
    for part in scheme.parts:
        for name in names:
            if name.endswith(f".{part}"):
                found.setdefault(name.removesuffix(f".{part}"), {})[part] = name
    return {name: parts for name, parts in found.items() if parts.keys() != {"weight"}}
