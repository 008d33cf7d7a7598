// The launches of copy_blocks.

#include "copy_blocks.cuh"

namespace octavo_cuda {

const char* copy_blocks(const Part* parts, int num_parts, char* aside, const int64_t* src, const int64_t* dst,
                        int64_t num_copies, void* stream) {
  const auto in_stream = static_cast<cudaStream_t>(stream);
  const char* failed = nullptr;
  launch_all(parts, num_parts, src, dst, num_copies,
             [&](auto kernel, const Parts& table, const Grid& grid, const int64_t* ids) {
               kernel<<<dim3(grid.x, grid.y, grid.z), kThreads, 0, in_stream>>>(table, aside, ids, num_copies);
               const cudaError_t error = cudaGetLastError();
               if (error != cudaSuccess && failed == nullptr) failed = cudaGetErrorString(error);
             });
  return failed;
}

}  // namespace octavo_cuda
