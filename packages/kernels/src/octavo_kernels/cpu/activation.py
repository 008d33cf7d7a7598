"""The activations of the `cpu` backend."""

from octavo_kernels.cpu.fallback.activation import gelu, gelu_and_mul, silu_and_mul

__all__ = ["gelu", "gelu_and_mul", "silu_and_mul"]
