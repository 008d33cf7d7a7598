// The launches of copy_blocks.

#include "copy_blocks.cuh"

namespace octavo_cuda {

const char* copy_blocks(const Part* parts, int num_parts, char* aside, const int64_t* src, const int64_t* dst,
                        int64_t num_copies, void* stream) {
  const auto in_stream = static_cast<cudaStream_t>(stream);
  const char* failed = nullptr;
  in_tables(parts, num_parts, [&](const Parts& table, int count) {
    const Grid grid = grid_of(table, count, num_copies);
    const dim3 blocks(grid.x, grid.y, grid.z);
    copy_rows<true><<<blocks, kThreads, 0, in_stream>>>(table, aside, src, num_copies);
    copy_rows<false><<<blocks, kThreads, 0, in_stream>>>(table, aside, dst, num_copies);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess && failed == nullptr) failed = cudaGetErrorString(error);
  });
  return failed;
}

}  // namespace octavo_cuda
