"""row_stride: the distance between a tensor's rows, where it is one."""

from torch import Tensor


def row_stride(tensor: Tensor) -> int | None:
    """Return how many elements lie between the starts of neighbouring rows (vectors along the last dimension).

    None when the rows do not lie at one distance, or the elements of a row not side by side.
    """
    if tensor.dim() == 2:
        return tensor.stride(0) if tensor.stride(1) == 1 or tensor.shape[1] == 1 else None
    return tensor.shape[-1] if tensor.is_contiguous() else None
