"""Recording and Program: a sequence of native CPU ops, collected once and then run by one call per step.

Between two steps of a model only the number of tokens changes; what is computed, and where, stays. While a Recording is
open, ops on CPU tensors note their arguments instead of computing, and take the memory for their results from the
recording, which keeps it. The program then runs all of them without Python in between. It is the CPU's counterpart of
a CUDA graph, except that it runs on any number of tokens up to the number it was recorded with.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo_kernels.cpu import abi
from octavo_kernels.cpu.run import prepare_ops
from octavo_kernels.errors import NotRecordable, OptionError

_ALIGNMENT = 64


class Program:
    """Recorded ops with everything they point to.

    Attributes:
        max_num_tokens: the tokens it was recorded with, the most it runs on.
        num_ops: how many ops it has.
        num_bytes: of the memory that the ops' results share.
    """

    def __init__(self, ops: Sequence[abi.Op], *, max_num_tokens: int, num_bytes: int, keep: object) -> None:
        self.max_num_tokens = max_num_tokens
        self.num_ops = len(ops)
        self.num_bytes = num_bytes
        self._ops = (abi.Op * len(ops))(*ops)
        self._step = abi.Step()
        self._run = prepare_ops(self._ops, self.num_ops, self._step)
        self._keep = keep  # tensors and structs that the ops point to

    def run(self, num_tokens: int, num_seqs: int) -> None:
        """Run all ops on the first `num_tokens` rows of the tensors they were recorded with; not thread-safe.

        Args:
            num_tokens: rows of every tensor that had `max_num_tokens` rows when it was recorded.
            num_seqs: sequences, for attention.

        Raises:
            OptionError: more tokens than the program was recorded with.
        """
        if not 0 <= num_tokens <= self.max_num_tokens:
            raise OptionError(
                f"Program.run: num_tokens is {num_tokens}, expected at most {self.max_num_tokens}, as recorded; "
                "record with more tokens"
            )
        self._step.num_tokens, self._step.num_seqs = num_tokens, num_seqs
        self._run()

    def then(self, after: Program) -> Program:
        """Return a program that runs this one and another after it, in one call.

        It runs on as many tokens as both do, and shares their memory.
        """
        return Program(
            [*self._ops, *after._ops],
            max_num_tokens=min(self.max_num_tokens, after.max_num_tokens),
            num_bytes=self.num_bytes + after.num_bytes,
            keep=(self, after),
        )


class Recording:
    """While it is open in a thread, native ops of that thread are collected; afterwards `program` holds them.

    Args:
        max_num_tokens: tensors with this many rows are those of the step's tokens; their rows vary between runs.

    Raises:
        NotRecordable: (inside) torch computed something itself, or an op has no native code for its arguments.

    Example:
        >>> with Recording(max_num_tokens=256) as recording:
        ...     hidden = model(model_input)  # every tensor in it has 256 tokens
        >>> recording.program.run(num_tokens=3, num_seqs=3)  # rows 0 to 2 of hidden hold the result
    """

    def __init__(self, max_num_tokens: int) -> None:
        self.max_num_tokens = max_num_tokens
        self._arena = _Arena()
        self._ops: list[abi.Op] = []
        self._keep: list[object] = []
        self._guard: AbstractContextManager[Any] = cast("Any", _OnlyViews)()
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        """The recorded program; there is none before the recording has ended."""
        assert self._program is not None, "the recording is still open, or failed"
        return self._program

    def add(self, kind: abi.OpKind, args: ctypes.Structure, num_rows: int, keep: tuple[Tensor | None, ...]) -> None:
        """Append an op; `keep` are the tensors that its arguments point to."""
        self._ops.append(
            abi.Op(
                kind=kind,
                per_token=int(num_rows == self.max_num_tokens),
                num_rows=num_rows,
                args=ctypes.addressof(args),
            )
        )
        # Tensors made by the recording are not kept: their memory may serve again once nobody else needs them.
        self._keep.append((args, [t for t in keep if t is not None and not self._arena.owns(t)]))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for an op's result; it serves again after the last tensor that uses it is gone."""
        return self._arena.empty(shape, dtype)

    def __enter__(self) -> Self:
        assert getattr(_active, "recording", None) is None, "one recording at a time"
        _active.recording = self
        self._guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.__exit__(kind, error, trace)
        _active.recording = None
        if error is None:
            self._program = Program(
                self._ops,
                max_num_tokens=self.max_num_tokens,
                num_bytes=self._arena.num_bytes,
                keep=(self._keep, self._arena),
            )


_active = threading.local()


def current() -> Recording | None:
    """Return the recording that is open in this thread."""
    return cast("Recording | None", getattr(_active, "recording", None))


def empty_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for an op's result: the recording's where one is open in this thread and the device is the CPU."""
    open_recording = current()
    if open_recording is not None and device.type == "cpu":
        return open_recording.empty(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


class _Arena:
    """Memory for results. A chunk serves again when no tensor uses it any more, so that layers share chunks."""

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []

    @property
    def num_bytes(self) -> int:
        return sum(chunk.memory.nbytes for chunk in self._chunks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = max(1, math.prod(shape)) * dtype.itemsize
        chunk = self._take(num_bytes)
        used = chunk.memory[:num_bytes]
        chunk.user = weakref.ref(used)
        # The tensor's storage holds `used`, which therefore lives as long as the tensor and its views.
        return torch.frombuffer(used, dtype=torch.uint8).view(dtype)[: math.prod(shape)].view(*shape)

    def owns(self, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        return any(chunk.address <= address < chunk.address + chunk.memory.nbytes for chunk in self._chunks)

    def _take(self, num_bytes: int) -> _Chunk:
        """Return the smallest free chunk that is large enough, or a new one."""
        free = [chunk for chunk in self._chunks if chunk.is_free and chunk.memory.nbytes >= num_bytes]
        if free:
            return min(free, key=lambda chunk: chunk.memory.nbytes)
        self._chunks.append(_Chunk(num_bytes))
        return self._chunks[-1]


class _Chunk:
    """Some bytes at an aligned address, and a reference to the view of them that a tensor holds."""

    def __init__(self, num_bytes: int) -> None:
        raw = bytearray(num_bytes + _ALIGNMENT)
        start = -_address(raw) % _ALIGNMENT
        self.address = _address(raw) + start
        self.memory = memoryview(raw)[start : start + num_bytes]
        self.user: weakref.ref[memoryview] | None = None

    @property
    def is_free(self) -> bool:
        return self.user is None or self.user() is None


def _address(memory: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the class unannotated
    """Lets torch make views and refuses every other operation: a program would not repeat it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping `__torch_dispatch__` against torch.compile: that imports the compiler, about 1 s."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returns = func._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return func(*args, **(kwargs or {}))
        raise NotRecordable(
            f"Recording: torch computed {func} between the ops, expected views alone; "
            "a program would not repeat it, so use an op of octavo_kernels instead"
        )
