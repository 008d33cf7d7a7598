// The ops that torch sees, through its stable ABI alone: one build serves every torch from 2.11 on.
//
// A stream comes as an argument, so that nothing of torch's CUDA part is linked and a torch without it can load this.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "copy_blocks.h"

namespace {

using octavo_cuda::Part;
using torch::stable::Tensor;

// caches: [num_blocks, n] each, rows without gaps; aside: uint8 memory for all rows that are copied.
void copy_blocks(std::vector<Tensor> caches, Tensor src, Tensor dst, Tensor aside, int64_t stream) {
  const int64_t num_copies = src.numel();
  STD_TORCH_CHECK(dst.numel() == num_copies, "copy_blocks (cuda): dst has another length than src");
  STD_TORCH_CHECK(src.element_size() == 8 && src.is_contiguous() && dst.element_size() == 8 && dst.is_contiguous(),
                  "copy_blocks (cuda): src and dst must be contiguous int64");
  std::vector<Part> parts;
  int64_t taken = 0;
  for (Tensor& cache : caches) {
    STD_TORCH_CHECK(cache.dim() == 2 && cache.stride(1) == 1, "copy_blocks (cuda): a cache must be rows without gaps");
    const auto size = static_cast<int64_t>(cache.element_size());
    auto* const blocks = static_cast<char*>(cache.mutable_data_ptr());
    const int64_t stride = cache.stride(0) * size, row_bytes = cache.size(1) * size;
    parts.push_back(octavo_cuda::make_part(blocks, stride, row_bytes, num_copies, &taken));
  }
  auto* const memory = static_cast<char*>(aside.mutable_data_ptr());
  STD_TORCH_CHECK(aside.numel() * static_cast<int64_t>(aside.element_size()) >= taken &&
                      reinterpret_cast<uint64_t>(memory) % 16 == 0,
                  "copy_blocks (cuda): aside is too small, or begins at no multiple of 16 bytes");
  if (num_copies == 0 || parts.empty()) return;
  const char* const error = octavo_cuda::copy_blocks(
      parts.data(), static_cast<int>(parts.size()), memory, static_cast<const int64_t*>(src.const_data_ptr()),
      static_cast<const int64_t*>(dst.const_data_ptr()), num_copies, reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(error == nullptr, "copy_blocks (cuda): ", error == nullptr ? "" : error);
}

}  // namespace

STABLE_TORCH_LIBRARY(octavo_cuda, m) {
  m.def("copy_blocks(Tensor(a!)[] caches, Tensor src, Tensor dst, Tensor(b!) aside, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(octavo_cuda, CUDA, m) { m.impl("copy_blocks", TORCH_BOX(&copy_blocks)); }
