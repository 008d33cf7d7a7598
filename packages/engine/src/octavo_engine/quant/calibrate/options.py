"""QuantizeOptions: how a checkpoint is to be quantised, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.errors import InvalidConfig

METHODS = ("gptq", "awq", "rtn")
_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
_MOST_GROUP = 1 << 20

TUNED_ROWS = 4
"""Sequences of one step of tuning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How the linears of a model are rounded, and by how much text.

    Attributes:
        method: `gptq` (arXiv 2210.17323), `awq` (arXiv 2306.00978), or `rtn`, round-to-nearest, which needs no text.
            The first and the last are written in the layout of GPTQ, the second in AutoAWQ's `gemm`.
        bits: of a code: 2, 3, 4 or 8; of `awq` 4.
        group_size: inputs that share a scale; None is all of a linear's.
        symmetric: whether the zero is the middle of the codes. Such weights of 4 and 8 bits are GGUF's Q4_0 and Q8_0,
            and kernels elsewhere take them more often; the others fit the weights better.
        act_order: of `gptq`, whether inputs are rounded in the order of their size, and groups made of them so.
        damping: of `gptq`, what is added to the Hessian's diagonal, as a share of its mean.
        descent_rounds: of `gptq`, how often each linear's codes and scales are then looked at again; see `descend`.
        tune_steps: of `gptq`, steps in which scales and norms are then learnt together; see `tune`.
        num_sequences: sequences of the text that linears are rounded by.
        sequence_length: tokens of each.

    Raises:
        InvalidConfig: if a value is out of range, or does not go with another.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = False
    act_order: bool = False
    damping: float = 0.01
    descent_rounds: int = 3
    tune_steps: int = 0
    num_sequences: int = 64
    sequence_length: int = 512

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidConfig(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.bits not in _BITS:
            raise InvalidConfig(f"bits must be one of {', '.join(map(str, _BITS))}, got {self.bits}")
        if self.method == "awq" and self.bits != _AWQ_BITS:
            raise InvalidConfig(f"method 'awq' is stored in 4 bits, got bits {self.bits}; use 4, or method gptq")
        if self.method == "awq" and self.symmetric:
            raise InvalidConfig("method 'awq' is stored with zeros, symmetric came too; leave it out, or use gptq")
        if self.act_order and self.method != "gptq":
            raise InvalidConfig(f"act_order goes with method 'gptq', got {self.method!r}; leave it out")
        if self.tune_steps and self.method != "gptq":
            raise InvalidConfig(f"tune_steps go with method 'gptq', got {self.method!r}; leave them out")
        if self.descent_rounds < 0:
            raise InvalidConfig(f"descent_rounds must be 0 or more, got {self.descent_rounds}")
        if self.tune_steps < 0:
            raise InvalidConfig(f"tune_steps must be 0 or more, got {self.tune_steps}")
        if self.group_size is not None and not 1 <= self.group_size <= _MOST_GROUP:
            raise InvalidConfig(f"group_size must be from 1 to {_MOST_GROUP}, or None for all, got {self.group_size}")
        if not 0 < self.damping < 1:
            raise InvalidConfig(f"damping must be above 0 and below 1, got {self.damping}; 0.01 is usual")
        if self.num_sequences < 1:
            raise InvalidConfig(f"num_sequences must be at least 1, got {self.num_sequences}")
        if self.sequence_length < 2:
            raise InvalidConfig(f"sequence_length must be at least 2, got {self.sequence_length}")
