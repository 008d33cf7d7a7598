"""rope_kv_write of the `cpu` backend."""

from octavo_kernels.cpu.fallback.rope import rope_kv_write

__all__ = ["rope_kv_write"]
