"""The `cpu` backend: one file per op; `fallback` holds the same ops in batched torch."""
