"""The noise of the `cpu` backend: batched torch."""

from octavo_kernels.cpu.fallback.noise import gumbel_noise, gumbel_noise_at, philox

__all__ = ["gumbel_noise", "gumbel_noise_at", "philox"]
