// The kernel of copy_blocks. Tests compile it for the host too, thread after thread: its threads share nothing.

#pragma once

#include "copy_blocks.h"

namespace octavo_cuda {

// Moves a row in units of T; the thread blocks along z take it in turns.
template <typename T>
__device__ __forceinline__ void copy_row(char* __restrict__ to, const char* __restrict__ from, int64_t row_bytes) {
  T* const target = reinterpret_cast<T*>(to);
  const T* const source = reinterpret_cast<const T*>(from);
  const int64_t count = row_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t step = static_cast<int64_t>(gridDim.z) * blockDim.x;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.z) * blockDim.x + threadIdx.x; i < count; i += step) {
    target[i] = source[i];
  }
}

// Copies the blocks that ids name aside, or what lies aside to the blocks that ids name.
template <bool kAside>
__global__ void __launch_bounds__(kThreads)
    copy_rows(const __grid_constant__ Parts parts, char* aside, const int64_t* ids, int64_t num_copies) {
  const Part& part = parts.part[blockIdx.y];
  for (int64_t copy = blockIdx.x; copy < num_copies; copy += gridDim.x) {
    char* const block = part.blocks + ids[copy] * part.stride;
    char* const row = aside + part.aside + copy * part.row_bytes;
    char* const to = kAside ? row : block;
    const char* const from = kAside ? block : row;
    switch (part.width) {  // the same for the whole thread block
      case 16:
        copy_row<uint4>(to, from, part.row_bytes);
        break;
      case 8:
        copy_row<uint2>(to, from, part.row_bytes);
        break;
      case 4:
        copy_row<uint32_t>(to, from, part.row_bytes);
        break;
      case 2:
        copy_row<uint16_t>(to, from, part.row_bytes);
        break;
      default:
        copy_row<uint8_t>(to, from, part.row_bytes);
    }
  }
}

// Calls launch(kernel, table, grid, ids) for all that copies blocks src[i] to blocks dst[i] of all parts, in order.
template <typename Launch>
void launch_all(const Part* parts, int num_parts, const int64_t* src, const int64_t* dst, int64_t num_copies,
                const Launch& launch) {
  in_tables(parts, num_parts, [&](const Parts& table, int count) {
    const Grid grid = grid_of(table, count, num_copies);
    launch(copy_rows<true>, table, grid, src);
    launch(copy_rows<false>, table, grid, dst);
  });
}

}  // namespace octavo_cuda
