"""Cut: the part of a checkpoint's tensor that is read where a model is split over several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from octavo_engine.errors import CorruptModelFile

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class Cut(NamedTuple):
    """Some neighbouring rows (axis 0) or columns (axis 1) of a tensor that has `total` of them."""

    axis: int
    start: int
    stop: int
    total: int

    def check(self, name: str, shape: Shape, where: str) -> None:
        """Refuse a tensor that has another size than the cut was made for.

        Raises:
            CorruptModelFile: names the tensor.
        """
        if len(shape) <= self.axis or shape[self.axis] != self.total:
            kind = ("rows", "columns")[self.axis]
            raise CorruptModelFile(f"{where}: tensor {name!r}: expected {self.total} {kind}, found shape {list(shape)}")

    def of(self, shape: Shape) -> Shape:
        """Return the shape of the part."""
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor, contiguous."""
        return (tensor[self.span] if self.axis == 0 else tensor[:, self.span]).contiguous()

    @property
    def span(self) -> slice:
        """The rows or columns of the part."""
        return slice(self.start, self.stop)


CutRule = Callable[[str], Cut | None]
"""Says by a tensor's Hugging Face name which part of it is read; None is the whole."""


def read_whole(name: str) -> None:  # noqa: ARG001  # a CutRule
    """Read every tensor as it is."""
    return


Keep = Callable[[str], bool]
"""Says by a tensor's Hugging Face name whether it is read at all."""


def keep_all(name: str) -> bool:  # noqa: ARG001  # a Keep
    """Read every tensor."""
    return True
