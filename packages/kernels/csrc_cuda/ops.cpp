// The ops that torch sees, through its stable ABI alone: one build serves every torch from 2.11 on.
//
// A stream comes as an argument, so that nothing of torch's CUDA part is linked and a torch without it can load this.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "copy_blocks.h"

#ifndef OCTAVO_DEVICE  // tests bind kernels on the host for the CPU
#define OCTAVO_DEVICE CUDA
#endif

namespace {

using octavo_cuda::Kind;
using octavo_cuda::Part;
using octavo_cuda::Strides;
using torch::headeronly::ScalarType;
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

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Kind::kFp32;
    case ScalarType::Half:
      return Kind::kFp16;
    case ScalarType::BFloat16:
      return Kind::kBf16;
    case ScalarType::Char:
      return Kind::kInt8;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float8_e4m3fn, "split_keys (cuda): a dtype without a kernel");
      return Kind::kFp8;
  }
}

// Strides in bytes of [num_blocks, num_kv_heads, block_size, ...].
Strides strides_of(const Tensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  return {tensor.stride(0) * size, tensor.stride(1) * size, tensor.stride(2) * size};
}

const int32_t* numbers_of(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && (tensor.size(last) <= 1 || tensor.stride(last) == 1),
                  "split_keys (cuda): lengths, tables and the plan must be int32 without gaps");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void check_aligned(const void* memory, const Strides& strides) {
  const uint64_t bits = reinterpret_cast<uint64_t>(memory) | static_cast<uint64_t>(strides.block) |
                        static_cast<uint64_t>(strides.head) | static_cast<uint64_t>(strides.offset);
  STD_TORCH_CHECK(bits % 16 == 0, "split_keys (cuda): a vector begins at no multiple of 16 bytes");
}

// See SplitCall; num_rows: of a slot, width: tiles of rows per piece, num_blocks: of the grid.
void split_keys(Tensor q, Tensor k, Tensor v, Tensor query_start_loc, Tensor seq_lens, Tensor block_table,
                std::optional<Tensor> slopes, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, Tensor plan,
                Tensor parts, Tensor sums, double factor, double soft_cap, int64_t window, bool causal, int64_t num_rows,
                int64_t width, int64_t num_blocks, int64_t stream) {
  octavo_cuda::SplitCall call{};
  const int64_t num_heads = q.size(1), num_kv_heads = k.size(1), head_dim = q.size(2);
  const auto size = static_cast<int64_t>(q.element_size());
  STD_TORCH_CHECK(q.stride(2) == 1 && k.stride(3) == 1 && v.stride(3) == 1, "split_keys (cuda): a vector has gaps");
  STD_TORCH_CHECK(num_heads / num_kv_heads <= octavo_cuda::kTileRows, "split_keys (cuda): too many heads in a group");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type() && k_scale.has_value() == v_scale.has_value(),
                  "split_keys (cuda): k and v are not stored alike");
  call.q = static_cast<const char*>(q.const_data_ptr());
  call.k = static_cast<const char*>(k.const_data_ptr());
  call.v = static_cast<const char*>(v.const_data_ptr());
  call.query_start_loc = numbers_of(query_start_loc);
  call.seq_lens = numbers_of(seq_lens);
  call.block_table = numbers_of(block_table);
  call.plan = numbers_of(plan);
  if (slopes.has_value()) call.slopes = static_cast<const float*>(slopes->const_data_ptr());
  if (k_scale.has_value()) {
    call.k_scales = static_cast<const char*>(k_scale->const_data_ptr());
    call.v_scales = static_cast<const char*>(v_scale->const_data_ptr());
    call.k_scale_strides = strides_of(*k_scale);
    call.v_scale_strides = strides_of(*v_scale);
  }
  call.parts = static_cast<float*>(parts.mutable_data_ptr());
  call.sums = static_cast<float*>(sums.mutable_data_ptr());
  call.q_token = q.stride(0) * size;
  call.q_head = q.stride(1) * size;
  call.table_row = block_table.stride(0);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  check_aligned(call.q, {call.q_token, call.q_head, 0});
  check_aligned(call.k, call.k_strides);
  check_aligned(call.v, call.v_strides);
  check_aligned(call.parts, {});
  call.factor = static_cast<float>(factor);
  call.soft_cap = static_cast<float>(soft_cap);
  call.window = static_cast<int>(window);
  call.causal = causal ? 1 : 0;
  call.num_seqs = static_cast<int>(seq_lens.size(0));
  call.num_kv_heads = static_cast<int>(num_kv_heads);
  call.group = static_cast<int>(num_heads / num_kv_heads);
  call.block_size = static_cast<int>(k.size(2));
  call.num_rows = static_cast<int>(num_rows);
  call.width = static_cast<int>(width);
  const char* const error = octavo_cuda::split_keys(call, kind_of(q), kind_of(k), head_dim, static_cast<int>(num_blocks),
                                                    reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(error == nullptr, "split_keys (cuda): ", error == nullptr ? "" : error);
}

}  // namespace

STABLE_TORCH_LIBRARY(octavo_cuda, m) {
  m.def("copy_blocks(Tensor(a!)[] caches, Tensor src, Tensor dst, Tensor(b!) aside, int stream) -> ()");
  m.def(
      "split_keys(Tensor q, Tensor k, Tensor v, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "Tensor? slopes, Tensor? k_scale, Tensor? v_scale, Tensor plan, Tensor(a!) parts, Tensor(b!) sums, float factor, "
      "float soft_cap, int window, bool causal, int num_rows, int width, int num_blocks, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(octavo_cuda, OCTAVO_DEVICE, m) {
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("split_keys", TORCH_BOX(&split_keys));
}
