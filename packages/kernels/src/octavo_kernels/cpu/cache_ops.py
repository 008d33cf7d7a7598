"""The cache writes, copies and reads of the `cpu` backend."""

from octavo_kernels.cpu.fallback.cache_ops import copy_blocks, gather_kv, write_kv

__all__ = ["copy_blocks", "gather_kv", "write_kv"]
