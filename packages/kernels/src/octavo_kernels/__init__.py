"""Paged attention and the kernels around it, on plain torch tensors: CPU, Triton, and a plain reference."""
