"""Packed weights and their products of the `cpu` backend."""

from octavo_kernels.cpu.fallback.matmul import (
    pack_weight,
    packed_argmax,
    packed_embedding,
    packed_linear,
    unpack_weight,
)

__all__ = ["pack_weight", "packed_argmax", "packed_embedding", "packed_linear", "unpack_weight"]
