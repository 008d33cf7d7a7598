"""Kernels in CUDA C++, where a build of `csrc_cuda` is installed; loaded by the first call on a GPU that wants one."""
