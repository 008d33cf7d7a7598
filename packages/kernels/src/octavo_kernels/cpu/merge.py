"""merge_states of the `cpu` backend: batched torch."""

from octavo_kernels.cpu.fallback.merge import merge_states

__all__ = ["merge_states"]
