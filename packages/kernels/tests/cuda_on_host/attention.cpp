// The kernel of attention over split keys on the host: its thread blocks one after the other, in an order drawn from a
// seed. `ops.cpp` binds it for tensors of the CPU.

#include "device.h"

#include "attention.cuh"
#include "copy_blocks.h"

namespace octavo_cuda {

const char* split_keys(const SplitCall& call, Kind query, Kind stored, int64_t head_dim, int num_blocks, void* stream) {
  std::mt19937 chance(static_cast<unsigned>(reinterpret_cast<uint64_t>(stream)));
  const bool found = with_kernel(query, stored, head_dim, [&](auto kernel, int threads, int num_bytes, bool is_fp8) {
    std::vector<unsigned> order(static_cast<size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), chance);
    gridDim = {static_cast<unsigned>(num_blocks), 1, 1};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    for (const unsigned index : order) {
      blockIdx = {index, 0, 0};
      run_block(blockDim.x, static_cast<size_t>(num_bytes), [&] { kernel(call, is_fp8); }, chance);
    }
  });
  return found ? nullptr : "there is no kernel for these dtypes and this head_dim";
}

const char* copy_blocks(const Part*, int, char*, const int64_t*, const int64_t*, int64_t, void*) {
  return "copy_blocks.cpp runs it on the host";
}

}  // namespace octavo_cuda
