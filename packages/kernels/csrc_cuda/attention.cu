// The launches of attention over split keys.

#include "attention.cuh"

namespace octavo_cuda {

const char* split_keys(const SplitCall& call, Kind query, Kind stored, int64_t head_dim, int num_blocks, void* stream) {
  cudaError_t error = cudaSuccess;
  const bool found = with_kernel(query, stored, head_dim, [&](auto kernel, int threads, int num_bytes, bool is_fp8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
    if (error != cudaSuccess) return;
    kernel<<<static_cast<unsigned>(num_blocks), static_cast<unsigned>(threads), static_cast<size_t>(num_bytes),
             static_cast<cudaStream_t>(stream)>>>(call, is_fp8);
    error = cudaGetLastError();
  });
  if (!found) return "there is no kernel for these dtypes and this head_dim";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace octavo_cuda
