"""QuantizedFiles: a folder's weights in which every quantised linear comes as one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from octavo_engine.quant.schemes.base import Scheme, StoredLinear
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
        self.num_weights = len(self._linears) + len(self._others)

    def __iter__(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yield every weight with its name: those that are not quantised, then the linears."""
        with self._files.open() as read:
            for name in self._others:
                yield name, read(name)
            for name, parts in self._linears.items():
                linear = StoredLinear(name, parts, read, self._files.path_of, self._files.metadata)
                yield f"{name}.weight", self._scheme.read(linear)


def _linears(names: list[str], scheme: Scheme) -> dict[str, dict[str, str]]:
    """Return by linear the names of its parts."""
    found: dict[str, dict[str, str]] = {}
    for part in scheme.parts:
        for name in names:
            if name.endswith(f".{part}"):
                found.setdefault(name.removesuffix(f".{part}"), {})[part] = name
    return {name: parts for name, parts in found.items() if parts.keys() != {"weight"}}
