"""GGUFFile: the header of a GGUF file (versions 2 and 3), checked, and its tensors' bytes as views into a memory map.

The format (all numbers little-endian)::

    "GGUF" | version u32 | num_tensors u64 | num_keys u64
    num_keys x    key string | value type u32 | value            string = length u64, UTF-8 bytes
    num_tensors x name string | num_dims u32 | dims u64 x num_dims, fastest first | type u32 | offset u64
    padding to general.alignment (default 32) | tensor data, offsets counted from here

A file comes from a stranger: every count, length and offset is compared with the bytes that are left before anything
is allocated or read, so that a damaged file costs no more memory than its own size and ends in a typed error.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 1024
_MAX_DIMS = 4
_MIN_KEY_ENTRY = 8 + 4 + 1
_MIN_TENSOR_ENTRY = 8 + 4 + 8 + 4 + 8

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8"))
    if name
}
_VALUE_TYPE_NAMES = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array"),
    *("uint64", "int64", "float64"),
)


class TensorType(IntEnum):
    """The tensor types that we read, by their code in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40

    @property
    def block_elements(self) -> int:
        """How many consecutive elements of a row form one block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """How many bytes one block takes in the file."""
        return _BLOCKS[self][1]


# (elements, bytes) of a block; `dequantize` and the modules beside it say what is in one.
_BLOCKS = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.BF16: (1, 2),
    TensorType.F64: (1, 8),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.Q8_K: (256, 292),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.IQ1_S: (256, 50),
    TensorType.IQ1_M: (256, 56),
    TensorType.IQ2_XXS: (256, 66),
    TensorType.IQ2_XS: (256, 74),
    TensorType.IQ2_S: (256, 82),
    TensorType.IQ3_XXS: (256, 98),
    TensorType.IQ3_S: (256, 110),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ4_XS: (256, 136),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
}
# Types that have a number but that we do not read, for the error message: Q8_1 is a type of ggml's own steps that no
# file stores, the others left the format or are younger than its published readers.
_OTHER_TYPES = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 41: "Q1_0"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in the file.

    `shape` has the slowest dimension first, as torch has it; `offset` and `num_bytes` count from the file's start.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    num_bytes: int


class GGUFFile:
    """A GGUF file, open for reading: `metadata` by key, `tensors` by name, and the tensors' bytes.

    Numeric arrays in `metadata` are numpy arrays, string arrays are lists of str. The map lives as long as any array
    taken from it.

    Raises:
        ModelNotFound: if there is no such file.
        CorruptModelFile: if the header is damaged or points outside the file; names the key or tensor.
        UnsupportedModel: if the version, the byte order or a tensor's type is none that we read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _open_map(path)
        reader = _HeaderReader(path, self._map)
        self.version, num_tensors, num_keys = reader.read_start()
        self.metadata: dict[str, Any] = reader.read_metadata(num_keys)
        self.tensors: dict[str, TensorInfo] = reader.read_tensors(num_tensors, self.metadata)
        self.header_bytes = reader.position

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes as they are in the file: [num_bytes] uint8, a view into the map.

        The map is private: writing to the view changes neither the file nor what another process reads.

        Raises:
            KeyError: if there is no such tensor.
        """
        info = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=info.num_bytes, offset=info.offset)


def _open_map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise CorruptModelFile(f"{path}: expected a GGUF file, found an empty file")
            # Copy-on-write, because torch wants writable memory under a tensor; nobody writes to it.
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: no such file") from error
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be opened for reading: {error.strerror or error}") from error


class _HeaderReader:
    """A position in the map that moves forward, and the checks that keep it inside."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self.position = 0

    def _fail(self, what: str) -> NoReturn:
        raise CorruptModelFile(f"{self._path}: {what}; download or convert the file again")

    def _take(self, num_bytes: int, what: str) -> int:
        """Return the present position and move past `num_bytes`."""
        start = self.position
        left = self._size - start
        if num_bytes > left:
            self._fail(f"{what} at byte {start}: expected {num_bytes} bytes, found {left} before the end of the file")
        self.position = start + num_bytes
        return start

    def _u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._data, self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._data, self._take(8, what))[0])

    def _string(self, what: str, max_bytes: int | None = None) -> str:
        length = self._u64(f"{what}, its length")
        if max_bytes is not None and length > max_bytes:
            self._fail(
                f"{what} at byte {self.position}: expected at most {max_bytes} bytes, found a length of {length}"
            )
        start = self._take(length, what)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            self._fail(f"{what} at byte {start}: expected UTF-8, found {error.reason}")

    def _check_count(self, what: str, count: int, min_bytes_each: int) -> None:
        left = self._size - self.position
        if count * min_bytes_each > left:
            self._fail(f"expected {count} {what}, found {left} bytes, room for at most {left // min_bytes_each}")

    def read_start(self) -> tuple[int, int, int]:
        """Return version, number of tensors and number of keys."""
        start = self._take(4, "the magic number")
        magic = self._data[start : start + 4]
        if magic != _MAGIC:
            self._fail(f"expected the magic number {_MAGIC!r}, found {magic!r}: this is no GGUF file")
        version = self._u32("the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"version {swapped} in big-endian order" if swapped in _VERSIONS else f"version {version}"
            raise UnsupportedModel(f"{self._path}: GGUF {found}; versions 2 and 3, little-endian, are read")
        num_tensors = self._u64("the number of tensors")
        num_keys = self._u64("the number of metadata keys")
        self._check_count("metadata keys", num_keys, _MIN_KEY_ENTRY)
        self._check_count("tensors", num_tensors, _MIN_TENSOR_ENTRY)
        return version, num_tensors, num_keys

    def read_metadata(self, num_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self._string(f"the name of metadata key {index}", _MAX_KEY_BYTES)
            if key in metadata:
                self._fail(f"metadata key {key!r}: expected once, found twice")
            metadata[key] = self._value(key)
        return metadata

    def _value(self, key: str) -> Any:
        what = f"metadata key {key!r}"
        code = self._u32(f"{what}, its type")
        if code == _STRING:
            return self._string(what)
        if code == _ARRAY:
            return self._array(what)
        dtype = self._scalar_type(what, code)
        start = self._take(dtype.itemsize, what)
        return np.frombuffer(self._data, dtype, count=1, offset=start)[0].item()

    def _scalar_type(self, what: str, code: int) -> np.dtype[Any]:
        if code not in _SCALARS:
            last = len(_VALUE_TYPE_NAMES) - 1
            self._fail(f"{what}: expected a value type from 0 to {last}, found {code}")
        return _SCALARS[code]

    def _array(self, what: str) -> Any:
        code = self._u32(f"{what}, its element type")
        count = self._u64(f"{what}, its length")
        if code == _STRING:
            return self._string_array(what, count)
        if code == _ARRAY:
            raise UnsupportedModel(f"{self._path}: {what}: an array of arrays is not read; flat arrays are")
        dtype = self._scalar_type(what, code)
        start = self._take(count * dtype.itemsize, what)
        return np.frombuffer(self._data, dtype, count=count, offset=start).copy()

    def _string_array(self, what: str, count: int) -> list[str]:
        """Read a list of strings; written out flat because a vocabulary has a hundred thousand of them."""
        self._check_count(f"strings in {what}", count, 8)
        data, size, position, unpack = self._data, self._size, self.position, _U64.unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                start = position + 8
                position = start + length
                if position > size:
                    left = size - start
                    self._fail(f"{what}, element {len(strings)}: expected {length} bytes, found {left} before the end")
                append(str(data[start:position], "utf-8"))
        except struct.error:
            self._fail(f"{what}, element {len(strings)}: expected 8 bytes for its length, found {size - position}")
        except UnicodeDecodeError as error:
            self._fail(f"{what}, element {len(strings)}: expected UTF-8, found {error.reason}")
        self.position = position
        return strings

    def read_tensors(self, num_tensors: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        alignment = self._alignment(metadata)
        entries = [self._tensor_entry(index) for index in range(num_tensors)]
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, tensor_type, offset in entries:
            if name in tensors:
                self._fail(f"tensor {name!r}: expected once, found twice")
            if offset % alignment:
                self._fail(f"tensor {name!r}: expected an offset that is a multiple of {alignment}, found {offset}")
            tensors[name] = self._place(name, shape, tensor_type, data_start + offset)
        self._check_overlap(tensors)
        return tensors

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            self._fail(
                f"metadata key 'general.alignment': expected a power of two up to {_MAX_ALIGNMENT}, found {value!r}"
            )
        return value

    def _tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = self._string(f"the name of tensor {index}", _MAX_NAME_BYTES)
        what = f"tensor {name!r}"
        num_dims = self._u32(f"{what}, its number of dimensions")
        if not 1 <= num_dims <= _MAX_DIMS:
            self._fail(f"{what}: expected 1 to {_MAX_DIMS} dimensions, found {num_dims}")
        shape = tuple(self._u64(f"{what}, dimension {i}") for i in range(num_dims))[::-1]
        if 0 in shape:
            self._fail(f"{what}: expected dimensions of at least 1, found shape {list(shape)}")
        code = self._u32(f"{what}, its type")
        if code not in _BLOCKS:
            found = _OTHER_TYPES.get(code, f"number {code}")
            raise UnsupportedModel(
                f"{self._path}: {what} has type {found}, which is none of the {len(TensorType)} that are read; "
                "convert the model again, to a type such as Q4_K"
            )
        return name, shape, TensorType(code), self._u64(f"{what}, its offset")

    def _place(self, name: str, shape: tuple[int, ...], tensor_type: TensorType, offset: int) -> TensorInfo:
        block = tensor_type.block_elements
        if shape[-1] % block:
            self._fail(f"tensor {name!r}: expected {tensor_type.name} rows of a multiple of {block}, found {shape[-1]}")
        num_bytes = tensor_type.block_bytes
        for size in (*shape[:-1], shape[-1] // block):
            num_bytes *= size
        if offset + num_bytes > self._size:
            self._fail(
                f"tensor {name!r} of type {tensor_type.name} and shape {list(shape)}: expected {num_bytes} bytes "
                f"from byte {offset}, found a file of {self._size} bytes"
            )
        return TensorInfo(name, shape, tensor_type, offset, num_bytes)

    def _check_overlap(self, tensors: dict[str, TensorInfo]) -> None:
        ordered = sorted(tensors.values(), key=lambda info: info.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.num_bytes > after.offset:
                end = before.offset + before.num_bytes
                self._fail(f"tensor {after.name!r}: expected to begin at byte {end} or later, found {after.offset}")
