"""launch: runs one native op now, or notes it where a recording is open."""

import ctypes

from torch import Tensor

from octavo_kernels import recording
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.run import run_ops


def launch(kind: abi.OpKind, args: ctypes.Structure, num_rows: int, *tensors: Tensor | None) -> None:
    """Run an op, or record it.

    Args:
        kind: which op.
        args: its filled struct.
        num_rows: rows of this call.
        tensors: whatever the struct points to; a recording keeps them.
    """
    open_recording = recording.current()
    if open_recording is not None:
        open_recording.add(kind, args, num_rows, tensors)
        return
    run_ops(abi.Op(kind=kind, per_token=0, num_rows=num_rows, args=ctypes.addressof(args)), 1, None)


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address for a struct, or None for a null pointer."""
    return None if tensor is None else tensor.data_ptr()
