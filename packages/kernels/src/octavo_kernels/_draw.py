"""DrawOptions: how each row of `sample_tokens` is drawn, checked once and handed to a backend."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import _check


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """One value per draw in each tensor; nobody writes it after construction.

    temperature: [draws] fp32. seeds, sequence_index, positions: [draws] int64, of the noise.
    top_k: [draws] int64 or None. top_p, min_p: [draws] fp32 or None.
    source_rows: [draws] int64, the row of logits that each draw goes by, or None.
    """

    temperature: Tensor
    seeds: Tensor
    sequence_index: Tensor
    positions: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    source_rows: Tensor | None

    def check(self, op: str, logits: Tensor) -> torch.device:
        """Check every tensor against the number of draws; return their device.

        Raises: ShapeError, DtypeError, DeviceError.
        """
        fp32 = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
        int64 = {
            "seeds": self.seeds,
            "sequence_index": self.sequence_index,
            "positions": self.positions,
            "top_k": self.top_k,
            "source_rows": self.source_rows,
        }
        num_draws = len(logits if self.source_rows is None else self.source_rows)
        for dtype, tensors in ((torch.float32, fp32), (torch.int64, int64)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    _check.shape(op, name, tensor, (num_draws,))
                    _check.dtype(op, name, tensor, dtype)
        return _check.same_device(op, logits=logits, **fp32, **int64)
