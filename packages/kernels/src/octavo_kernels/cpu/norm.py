"""The norms of the `cpu` backend."""

from octavo_kernels.cpu.fallback.norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
