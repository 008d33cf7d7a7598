"""Triton kernels: CUDA and ROCm tensors, or CPU tensors under TRITON_INTERPRET=1. Imported when first used."""
