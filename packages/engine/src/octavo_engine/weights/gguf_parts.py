"""GGUFParts: a model in one GGUF file, or in several that `gguf-split` made of one, read as if they were one.

Parts are named `NAME-00001-of-00003.gguf` and so on, all in one folder. Each has the keys `split.no` (from 0 on) and
`split.count`; the first has the model's own keys, and `split.tensors.count`, the number of tensors in all parts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo_engine.errors import CorruptModelFile, ModelNotFound
from octavo_engine.weights.gguf import GGUFFile, TensorInfo

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 65535


class GGUFParts:
    """The parts of a GGUF model, one or more, open for reading.

    `paths` are the files, `metadata` the first one's keys, `tensors` all parts' tensors by name, in the order of the
    parts and of their headers.

    Raises:
        ModelNotFound: if a part is missing, or the path is that of another part than the first.
        CorruptModelFile: if a part is damaged, is not the one its name says, or repeats another's tensor.
        UnsupportedModel: if a part is of a kind that we do not read.
    """

    def __init__(self, path: Path) -> None:
        first = GGUFFile(path)
        self.metadata: dict[str, Any] = first.metadata
        self.paths = _part_paths(path, first)
        files = [first, *map(GGUFFile, self.paths[1:])]
        for number, file in enumerate(files[1:], start=1):
            _check_part(file, number, len(files))
        self._file_of: dict[str, GGUFFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self._file_of:
                    raise CorruptModelFile(f"{file.path}: tensor {name!r} is also in {self._file_of[name].path.name}")
                self._file_of[name] = file
                self.tensors[name] = info
        if len(files) > 1:
            _check_number_of_tensors(first, len(self.tensors))
        self.in_order = tuple(
            info for file in files for info in sorted(file.tensors.values(), key=lambda info: info.offset)
        )
        """All tensors, in the order of their data."""

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes as they are in its file: [num_bytes] uint8, a view into the file's map.

        Raises:
            KeyError: if there is no such tensor.
        """
        return self._file_of[name].raw(name)

    def path_of(self, name: str) -> Path:
        """Return the file that a tensor is in; raises as `raw`."""
        return self._file_of[name].path


def _whole_number(file: GGUFFile, key: str, most: int) -> int:
    """Return a key's value, 0 where it is missing."""
    value = file.metadata.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise CorruptModelFile(f"{file.path}: metadata key {key!r}: expected 0 to {most}, found {value!r}")
    return value


def _part_paths(path: Path, first: GGUFFile) -> tuple[Path, ...]:
    """Return the files of all parts, which need not exist; of a file that is whole, itself."""
    count = _whole_number(first, "split.count", _MAX_PARTS)
    if count <= 1:
        return (path,)
    number = _whole_number(first, "split.no", _MAX_PARTS)
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[2]) != number + 1 or int(match[3]) != count:
        raise ModelNotFound(
            f"{path}: this is part {number + 1} of {count}; expected a name that ends in "
            f"-{number + 1:05}-of-{count:05}.gguf, beside the other parts"
        )
    paths = tuple(path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    if number != 0:
        raise ModelNotFound(f"{path}: this is part {number + 1} of {count}; name the first one, {paths[0].name}")
    for part in paths:
        if not part.is_file():
            raise ModelNotFound(f"{part}: no such file; {path.name} is one of {count} parts, and all are needed")
    return paths


def _check_part(file: GGUFFile, number: int, count: int) -> None:
    found = (_whole_number(file, "split.no", _MAX_PARTS), _whole_number(file, "split.count", _MAX_PARTS))
    if found != (number, count):
        raise CorruptModelFile(
            f"{file.path}: metadata keys 'split.no' and 'split.count': expected {number} and {count}, "
            f"found {found[0]} and {found[1]}; download the file again"
        )


def _check_number_of_tensors(first: GGUFFile, found: int) -> None:
    expected = first.metadata.get("split.tensors.count")
    if expected != found:
        raise CorruptModelFile(
            f"{first.path}: metadata key 'split.tensors.count': expected the {found} tensors of all parts, "
            f"found {expected!r}; download the files again"
        )
