"""The attention ops of the `cpu` backend."""

from octavo_kernels.cpu.fallback.attention import paged_attention, varlen_attention

__all__ = ["paged_attention", "varlen_attention"]
