"""SafetensorsFiles: the weights of a Hugging Face folder, one file or several with an index, read once each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo_engine.errors import CorruptModelFile, ModelNotFound
from octavo_engine.weights.cut import CutRule, Keep, keep_all, read_whole
from octavo_engine.weights.stacked import StackedMatrix, hf_stack

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8


class SafetensorsFiles:
    """The safetensors files of a folder.

    With an index, the files it names are read and every tensor must lie where it says; else `model.safetensors`; else
    every `*.safetensors` of the folder. `paths` are the files, `num_weights` the number of tensors in all of them,
    `num_bytes` what each takes, `metadata` what else the files say, by key.

    Raises:
        ModelNotFound: if the folder has no safetensors file.
        CorruptModelFile: if a file is missing, truncated or damaged, or a tensor is missing or comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / _INDEX
        self._indexed = _read_index(index) if index.is_file() else None
        self.paths = tuple(self._find_paths())
        headers = {path: _read_header(path) for path in self.paths}
        self._names = {path: header.names for path, header in headers.items()}
        self.num_bytes = {name: count for header in headers.values() for name, count in header.num_bytes.items()}
        self.metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
        self.num_weights = sum(map(len, self._names.values()))
        self._check_names()

    def _find_paths(self) -> list[Path]:
        if self._indexed is not None:
            paths = [self.folder / name for name in sorted(set(self._indexed.values()))]
            for path in paths:
                if not path.is_file():
                    raise CorruptModelFile(f"{path}: {_INDEX} names this file, but it is missing; download it again")
            return paths
        single = self.folder / _SINGLE
        paths = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ModelNotFound(f"{self.folder}: expected *.safetensors files, found none")
        return paths

    def _check_names(self) -> None:
        found: dict[str, Path] = {}
        for path, names in self._names.items():
            for name in names:
                if name in found:
                    raise CorruptModelFile(f"{path}: tensor {name!r} is also in {found[name].name}; expected it once")
                found[name] = path
        for name, file_name in (self._indexed or {}).items():
            if name not in found or found[name].name != file_name:
                raise CorruptModelFile(
                    f"{self.folder / file_name}: expected tensor {name!r} as {_INDEX} says, found none"
                )

    @property
    def names(self) -> list[str]:
        """The names of all tensors, file by file, in the order of their data."""
        return [name for names in self._names.values() for name in names]

    def path_of(self, name: str) -> Path:
        """Return the file that a tensor is in."""
        return next(path for path, names in self._names.items() if name in names)

    @contextmanager
    def open(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """Open the files as they are needed: a function that reads one tensor, in the type it is stored in."""
        from safetensors import SafetensorError, safe_open

        paths = {name: path for path, names in self._names.items() for name in names}
        opened: dict[Path, Any] = {}
        with ExitStack() as stack:

            def read(name: str) -> torch.Tensor:
                path = paths[name]
                try:
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor: torch.Tensor = opened[path].get_tensor(name)
                except SafetensorError as error:
                    raise CorruptModelFile(f"{path}: {error}; download the file again") from error
                return tensor

            yield read

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor with its name, file by file, in the type it is stored in."""
        return self.read(read_whole)

    def read(self, cut: CutRule, keep: Keep = keep_all, num_experts: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the part that a rule names of every tensor that is kept, as `__iter__` does the whole of all.

        Args:
            cut: the rule.
            keep: says which, by the names under which they come.
            num_experts: of a mixture, whose experts then come one by one, under names of their own.

        Raises:
            CorruptModelFile: a file cannot be read, or a tensor has another size than the rule was made for.
        """
        from safetensors import SafetensorError, safe_open

        for path, names in self._names.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in names:
                        matrices = hf_stack(name, num_experts)
                        for matrix in matrices:
                            if keep(matrix.name):
                                yield matrix.name, _read_matrix(file, name, matrix, num_experts, cut, path)
                        if not matrices and keep(name):
                            yield name, _read(file, name, cut, path)
            except SafetensorError as error:
                raise CorruptModelFile(f"{path}: {error}; download the file again") from error


def _read(file: Any, name: str, cut: CutRule, path: Path) -> torch.Tensor:
    """Read the part of a tensor that a rule names, and nothing else of it, out of an open file."""
    part = cut(name)
    tensor: torch.Tensor
    if part is None:
        tensor = file.get_tensor(name)
        return tensor
    stored = file.get_slice(name)
    part.check(name, tuple(stored.get_shape()), str(path))
    tensor = stored[part.span] if part.axis == 0 else stored[:, part.span]
    return tensor.contiguous()


def _read_matrix(
    file: Any, name: str, matrix: StackedMatrix, num_experts: int, cut: CutRule, path: Path
) -> torch.Tensor:
    """Read the part of a matrix in a stack that a rule names, and nothing else of the stack."""
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    rows, columns = matrix.rows(name, shape, num_experts, str(path)), slice(0, shape[2])
    if (part := cut(matrix.name)) is not None:
        part.check(matrix.name, (rows.stop - rows.start, shape[2]), str(path))
        if part.axis == 0:
            rows = slice(rows.start + part.start, rows.start + part.stop)
        else:
            columns = part.span
    tensor: torch.Tensor = stored[matrix.place, rows, columns]
    return tensor.contiguous()


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModelFile(f"{path}: expected a 'weight_map' from tensor to file, found {weight_map!r}")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or not file_name:
            raise CorruptModelFile(f"{path}: tensor {name!r}: expected a file name, found {file_name!r}")
    return weight_map


class _Header(NamedTuple):
    """What a file says: the names of its tensors, in the order of their data, the bytes of each, and its metadata."""

    names: list[str]
    num_bytes: dict[str, int]
    metadata: dict[str, Any]


def _read_header(path: Path) -> _Header:
    """Read a file's header; check the file's length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise CorruptModelFile(f"{path}: expected a header of {length} bytes, found a file of {size} bytes")
        header = _parse_object(file.read(length), path)
    metadata = header.pop("__metadata__", None)
    spans = {name: _span(name, entry, path) for name, entry in header.items()}
    end = _LENGTH_BYTES + length + max((stop for _, stop in spans.values()), default=0)
    if end != size:
        raise CorruptModelFile(f"{path}: expected {end} bytes, found {size}; download the file again")
    names = sorted(spans, key=spans.__getitem__)
    num_bytes = {name: stop - start for name, (start, stop) in spans.items()}
    return _Header(names, num_bytes, metadata if isinstance(metadata, dict) else {})


def _span(name: str, entry: Any, path: Path) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    match offsets:
        case [int(start), int(stop)] if 0 <= start <= stop:
            return start, stop
    raise CorruptModelFile(f"{path}: tensor {name!r}: expected 'data_offsets' [start, stop], found {offsets!r}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelNotFound: if the file is not there or cannot be read.
        CorruptModelFile: if it is no JSON object.
    """
    try:
        return _parse_object(path.read_bytes(), path)
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptModelFile(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptModelFile(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
