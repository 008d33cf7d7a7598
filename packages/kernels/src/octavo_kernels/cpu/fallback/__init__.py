"""Batched torch: serves the `cpu` backend where the native library does not, and tensors on any other device."""
