// The kernel of copy_blocks on the host: its thread blocks one after the other, in an order drawn from a seed.
//
// What is left out is what only a GPU can show: the launch itself, and that memory is seen in the order that CUDA promises.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct Dim {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static Dim gridDim, blockDim, blockIdx, threadIdx;

#include "copy_blocks.cuh"

namespace octavo_cuda {
namespace {

template <typename Kernel>
void run(const Kernel& kernel, const Parts& table, char* aside, const int64_t* ids, int64_t num_copies,
         std::mt19937& chance) {
  std::vector<unsigned> order(static_cast<size_t>(gridDim.x) * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), chance);
  for (const unsigned index : order) {
    blockIdx = Dim{index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(table, aside, ids, num_copies);
  }
}

}  // namespace
}  // namespace octavo_cuda

// Copies blocks of num_parts parts; most_in_grid clips the grid, so that thread blocks walk. Returns the bytes aside that
// were taken of those there are, and copies nothing if that is too many.
extern "C" int64_t copy_blocks_on_host(char* const* blocks, const int64_t* strides, const int64_t* row_bytes,
                                       int num_parts, char* aside, int64_t num_aside, const int64_t* src,
                                       const int64_t* dst, int64_t num_copies, unsigned most_in_grid, unsigned seed) {
  using namespace octavo_cuda;
  std::vector<Part> parts;
  int64_t taken = 0;
  for (int i = 0; i < num_parts; ++i) parts.push_back(make_part(blocks[i], strides[i], row_bytes[i], num_copies, &taken));
  if (taken > num_aside) return taken;
  std::mt19937 chance(seed);
  launch_all(parts.data(), num_parts, src, dst, num_copies,
             [&](const auto& kernel, const Parts& table, const Grid& grid, const int64_t* ids) {
               gridDim = Dim{std::min(grid.x, most_in_grid), grid.y, std::min(grid.z, most_in_grid)};
               blockDim = Dim{kThreads, 1, 1};
               run(kernel, table, aside, ids, num_copies, chance);
             });
  return taken;
}
