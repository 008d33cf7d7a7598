// Attention of short queries on a GPU: what one launch reads and leaves, and how it is cut; plain C++, for the launch,
// the binding and tests.
//
// It is the middle one of three launches (octavo_kernels/triton/split_attention.py): a plan on the device deals keys out
// in pieces before it, and what it leaves, a state of each row for each piece, is joined after it.

#pragma once

#include <cstdint>

namespace octavo_cuda {

constexpr int kTileRows = 16;  // pairs of a query and a head of the group, that share keys
constexpr int kTileKeys = 16;  // that a warp takes at once
constexpr int kBlocksPerProcessor = 2;  // as many as the grid has; where shared memory does not hold two, one waits

// The chunks that the plan counts keys in: octavo_kernels/_split_workspace.py.
constexpr int kNearChunk = 256;
constexpr int kFarChunk = 1024;
constexpr int kFar = 16384;

template <int kValue>
struct Size {
  static constexpr int value = kValue;
};

enum class Kind { kFp32, kFp16, kBf16, kInt8, kFp8 };  // kFp8: e4m3 without infinities

struct Strides {
  int64_t block, head, offset;  // bytes
};

// All pointers are the device's. rows of q: [num_tokens, num_heads, head_dim], the last without gaps, and every row of q
// and of the caches begins at a multiple of 16 bytes.
struct SplitCall {
  const char* q;
  const char* k;
  const char* v;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_table;
  const int32_t* plan;
  const float* slopes;   // of ALiBi, [num_heads]; or null
  const char* k_scales;  // fp32, a factor per vector; both or neither null
  const char* v_scales;
  float* parts;  // [num_slots, num_rows, head_dim] sums of values
  float* sums;   // [num_slots, num_rows, 2] the largest score, in base 2, and the sum of weights
  int64_t q_token, q_head;  // strides in bytes
  int64_t table_row;        // stride in entries
  Strides k_strides, v_strides, k_scale_strides, v_scale_strides;
  float factor;    // on scores: in base 2 where neither soft_cap nor slopes follow
  float soft_cap;  // or 0
  int window;      // or 0
  int causal;
  int num_seqs, num_kv_heads, group, block_size;
  int num_rows;  // of a slot
  int width;     // tiles of rows that read the same piece: key heads times tiles of queries
};
static_assert(sizeof(SplitCall) <= 4096, "a kernel's arguments may take 4 KiB");

// How a thread block is made for a kind of cache. Each warp takes its own keys and has its own stages in shared memory:
// while it computes from one, the others are on their way.
template <int kQueryBytes, int kStoredBytes, int kHeadDim>
struct Shape {
  static constexpr int kRowBytes = kHeadDim * kStoredBytes;
  static constexpr int kTileBytes = 2 * kTileKeys * kRowBytes;  // keys, then values
  static constexpr bool kScaled = kStoredBytes == 1;
  static constexpr int kStageBytes = kTileBytes + (kScaled ? 2 * kTileKeys * 4 : 0);  // then scales
  static constexpr int kWarps = kTileBytes <= 8192 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kTileBytes <= 4096 ? 4 : 2;
  static constexpr int kQueryTile = kTileRows * kHeadDim * kQueryBytes;
  static constexpr int kStateBytes = kTileRows * 2 * 4;  // of a warp: a row's largest score and sum of weights
  static constexpr int kSharedBytes = kQueryTile + kWarps * (kStages * kStageBytes + kStateBytes);
  static_assert(kSharedBytes <= 163 * 1024, "takes more shared memory than a thread block has on sm_80");
  static_assert(kTileRows * kHeadDim * 4 <= kStages * kStageBytes, "a warp leaves its sums where its stages were");
};

// Does all pieces of a plan by num_blocks thread blocks in a CUDA stream. Returns null, or what is wrong.
const char* split_keys(const SplitCall& call, Kind query, Kind stored, int64_t head_dim, int num_blocks, void* stream);

}  // namespace octavo_cuda
