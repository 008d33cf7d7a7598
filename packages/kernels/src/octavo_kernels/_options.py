"""AttentionOptions: what an attention op does to its scores, checked once and handed to a backend."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import _check


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How scores are made and masked; nobody writes it after construction.

    scale: factor on q·k. causal, window: which keys a query sees. soft_cap: s -> cap * tanh(s / cap).
    sinks, alibi_slopes: [num_heads] fp32 or None. batch_invariant: whether a query's bits may depend on its own keys
    alone. workspace: [num_bytes] uint8 or None, scratch memory for backends that split keys.
    """

    scale: float
    causal: bool
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    batch_invariant: bool = False
    workspace: Tensor | None = None

    def check(self, op: str, num_heads: int) -> None:
        """Check every option against its range.

        Raises: OptionError, ShapeError, DtypeError.
        """
        _check.option(op, "scale", self.scale, math.isfinite(self.scale), "a finite number")
        if self.window is not None:
            _check.option(op, "window", self.window, self.window >= 1, "None or at least 1 (the token itself)")
        if self.soft_cap is not None:
            valid = math.isfinite(self.soft_cap) and self.soft_cap > 0
            _check.option(op, "soft_cap", self.soft_cap, valid, "None or a finite number above 0")
        for name, tensor in (("sinks", self.sinks), ("alibi_slopes", self.alibi_slopes)):
            if tensor is not None:
                _check.shape(op, name, tensor, (num_heads,))
                _check.dtype(op, name, tensor, torch.float32)
