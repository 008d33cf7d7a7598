"""The `cpu` backend: one file per op, native code in csrc, and `fallback` with the same ops in batched torch."""
