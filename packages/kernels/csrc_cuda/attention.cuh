// The kernel of attention over split keys: Flash-Decoding (arXiv 2311.01282) in the pieces of a plan on the device.
//
// A thread block walks over pieces: some chunks of one sequence, for one key head and one tile of rows, which are all
// heads of the group for some queries. Its warps take 16 keys each in turn and know nothing of each other until the
// piece's end: each has a softmax of its own (arXiv 1805.02867, algorithm 3), and the states of a row are joined then.

#pragma once

#include "attention.h"
#ifdef __CUDACC__
#include "device.cuh"
#endif
#include "attention_products.cuh"

namespace octavo_cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNothing = -__builtin_huge_valf();  // the largest score of a row that has seen nothing

// What a thread block does next; equal in all its threads.
struct Piece {
  int first_token;       // of the sequence
  int query_len, seq_len;
  int first_query;       // of the tile, in the sequence
  int num_rows;          // of the tile that count
  int kv_head;
  int lowest;            // the first position that any query of the sequence sees
  int begin, end;        // positions of this piece; begin is a multiple of 16
  const int32_t* table;  // the sequence's row
  int64_t first_row;     // in all slots
};

__device__ __forceinline__ int chunk_of(int position) {
  return position < kFar ? position / kNearChunk : kFar / kNearChunk + (position - kFar) / kFarChunk;
}

__device__ __forceinline__ int chunk_start(int chunk) {
  constexpr int kNearChunks = kFar / kNearChunk;
  return chunk < kNearChunks ? chunk * kNearChunk : kFar + (chunk - kNearChunks) * kFarChunk;
}

// Returns how many of count rising numbers are at most `limit`, by a warp.
__device__ __forceinline__ int count_at_most(const int32_t* rising, int count, int limit) {
  int low = 0, high = count;
  while (true) {
    const int step = (high - low + 31) / 32;
    const int index = low + (lane_id() + 1) * step - 1;
    const int num_steps = count_lanes(index < high && rising[index] <= limit);
    low += num_steps * step;
    if (step <= 1) return low;
    high = low + step < high ? low + step : high;
  }
}

__device__ __forceinline__ Piece find_piece(const SplitCall& call, int work) {
  const int32_t* const first_slots = call.plan + call.num_seqs + 1;
  const int number = work / call.width, tile = work % call.width;
  const int sequence = count_at_most(call.plan, call.num_seqs, number) - 1;
  const int run = call.plan[3 * call.num_seqs + 1], place = number - call.plan[sequence];
  const int queries_per_tile = kTileRows / call.group;
  Piece piece;
  piece.first_token = call.query_start_loc[sequence];
  piece.query_len = call.query_start_loc[sequence + 1] - piece.first_token;
  piece.seq_len = call.seq_lens[sequence];
  piece.kv_head = tile % call.num_kv_heads;
  piece.first_query = tile / call.num_kv_heads * queries_per_tile;
  piece.num_rows = min(queries_per_tile, piece.query_len - piece.first_query) * call.group;
  piece.lowest = call.window > 0 ? max(0, piece.seq_len - piece.query_len - call.window + 1) : 0;
  const int chunk = chunk_of(piece.lowest) + place * run;
  piece.begin = max(chunk_start(chunk), piece.lowest / kTileKeys * kTileKeys);
  piece.end = min(chunk_start(chunk + run), piece.seq_len);
  piece.table = call.block_table + sequence * call.table_row;
  piece.first_row = static_cast<int64_t>(first_slots[sequence] + place) * call.num_rows +
                    piece.kv_head * (call.num_rows / call.num_kv_heads) + piece.first_query * call.group;
  return piece;
}

// A warp's way through the keys of a piece. Lanes 0-15 know where the keys of a tile lie, lanes 16-31 where its values.
template <typename Shape>
struct Reader {
  const SplitCall& call;
  const Piece& piece;
  int position = 0;  // of this lane's vector in the tile that comes next
  int block = -1;    // its block; -1 where no query sees the position

  __device__ __forceinline__ bool is_value() const { return lane_id() >= kTileKeys; }

  // Looks up the blocks of a tile, which takes a while: long before `fetch` needs them.
  __device__ __forceinline__ void look_up(int first_key) {
    position = first_key + lane_id() % kTileKeys;
    const bool present = position >= piece.lowest && position < piece.end;
    block = present ? piece.table[position / call.block_size] : -1;
  }

  __device__ __forceinline__ int64_t offset_in(const Strides& strides) const {
    return block * strides.block + piece.kv_head * strides.head + position % call.block_size * strides.offset;
  }

  // Begins to copy the tile that was looked up.
  __device__ __forceinline__ void fetch(char* stage) const {
    const bool present = block >= 0;
    const char* vector = nullptr;
    if (present) vector = is_value() ? call.v + offset_in(call.v_strides) : call.k + offset_in(call.k_strides);
    constexpr int kChunks = Shape::kRowBytes / 16;
#pragma unroll 4
    for (int i = 0; i < kChunks; ++i) {  // 32 rows of so many chunks, 32 chunks at once
      const int row = (32 * i + lane_id()) / kChunks, chunk = (32 * i + lane_id()) % kChunks;
      const auto from = reinterpret_cast<const char*>(from_lane(reinterpret_cast<unsigned long long>(vector), row));
      void* const to = stage + place_of<Shape::kRowBytes>(row, chunk);
      copy_aside<16>(to, from == nullptr ? call.k : from + 16 * chunk, from != nullptr);
    }
    if constexpr (Shape::kScaled) {
      const char* scale = is_value() ? call.v_scales : call.k_scales;
      if (scale != nullptr) {
        if (present) scale += is_value() ? offset_in(call.v_scale_strides) : offset_in(call.k_scale_strides);
        copy_aside<4>(stage + Shape::kTileBytes + 4 * lane_id(), scale, present);
      }
    }
  }
};

// What a lane's two rows, g and g + 8, have seen; sums of weights are of the lane's own keys.
template <int kHeadDim>
struct State {
  float sums[kHeadDim / 8][4] = {};
  float top[2] = {kNothing, kNothing};
  float total[2] = {0.0f, 0.0f};
};

// Makes final scores, in base 2, of products; -inf where a row does not see a key.
__device__ __forceinline__ void finish_scores(float (&scores)[2][4], const SplitCall& call, const Piece& piece,
                                              int first_key, const float* key_scales) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = g + i % 4 / 2 * 8, key = i / 4 * 8 + 2 * t + i % 2;
    float score = scores[i / 4][i % 4] * call.factor;
    if (key_scales != nullptr) score *= key_scales[key];
    const int position = first_key + key;
    const int distance = piece.seq_len - piece.query_len + piece.first_query + row / call.group - position;
    if (call.soft_cap > 0.0f) {  // tanh(y) = 1 - 2 / (exp(2y) + 1), which overflows to the right limit
      score = call.soft_cap * (1.0f - 2.0f / (exp2f(score * (2.0f * kLog2e / call.soft_cap)) + 1.0f));
    }
    if (call.slopes != nullptr && row < piece.num_rows) {
      score -= call.slopes[piece.kv_head * call.group + row % call.group] * static_cast<float>(abs(distance));
    }
    if (call.soft_cap > 0.0f || call.slopes != nullptr) score *= kLog2e;
    bool seen = position >= piece.lowest && position < piece.end;
    if (call.causal != 0) seen = seen && distance >= 0;
    if (call.window > 0) seen = seen && abs(distance) < call.window;
    scores[i / 4][i % 4] = seen ? score : kNothing;
  }
}

// Turns scores into weights and brings a state to the new largest score.
template <int kHeadDim>
__device__ __forceinline__ void weigh(float (&scores)[2][4], State<kHeadDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = fmaxf(fmaxf(scores[0][2 * half], scores[0][2 * half + 1]),
                      fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
    top = fmaxf(top, from_lane_across(top, 1));
    top = fmaxf(state.top[half], fmaxf(top, from_lane_across(top, 2)));
    // Of a row that has seen nothing the largest score is -inf, and -inf minus -inf would be NaN.
    const float shift = top == kNothing ? 0.0f : top;
    const float decay = exp2f(state.top[half] - shift);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][2 * half + i % 2];
      score = exp2f(score - shift);
      total += score;
    }
    state.total[half] = fmaf(state.total[half], decay, total);
    state.top[half] = top;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      state.sums[i][2 * half] *= decay;
      state.sums[i][2 * half + 1] *= decay;
    }
  }
}

// Leaves a warp's state where the other warps find it: [16, head_dim] sums, and [16, 2] scores and sums of weights.
template <int kHeadDim>
__device__ __forceinline__ void leave(const State<kHeadDim>& state, float* sums, float* tops) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = state.total[half];
    total += from_lane_across(total, 1);
    total += from_lane_across(total, 2);
    const int row = g + 8 * half;
    if (t == 0) {
      tops[2 * row] = state.top[half];
      tops[2 * row + 1] = total;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        sums[row * kHeadDim + i / 8 * 64 + 16 * t + 8 * side + i % 8] = state.sums[i][2 * half + side];
      }
    }
  }
}

// Joins what the warps have left, and stores it as the state of the piece.
template <typename Shape, int kHeadDim>
__device__ __forceinline__ void store_joined(const SplitCall& call, const Piece& piece, const char* stages,
                                             const float* tops) {
  for (int i = static_cast<int>(threadIdx.x); i < piece.num_rows * (kHeadDim / 4); i += Shape::kThreads) {
    const int row = i / (kHeadDim / 4), dim = i % (kHeadDim / 4) * 4;
    float top = kNothing;
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) top = fmaxf(top, tops[(warp * kTileRows + row) * 2]);
    const float shift = top == kNothing ? 0.0f : top;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) {
      const float* const left = reinterpret_cast<const float*>(stages + warp * Shape::kStages * Shape::kStageBytes);
      const float4 part = *reinterpret_cast<const float4*>(left + row * kHeadDim + dim);
      const float share = exp2f(tops[(warp * kTileRows + row) * 2] - shift);
      total = fmaf(tops[(warp * kTileRows + row) * 2 + 1], share, total);
      sum.x = fmaf(part.x, share, sum.x);
      sum.y = fmaf(part.y, share, sum.y);
      sum.z = fmaf(part.z, share, sum.z);
      sum.w = fmaf(part.w, share, sum.w);
    }
    *reinterpret_cast<float4*>(call.parts + (piece.first_row + row) * kHeadDim + dim) = sum;
    if (dim == 0) {
      call.sums[(piece.first_row + row) * 2] = top;
      call.sums[(piece.first_row + row) * 2 + 1] = total;
    }
  }
}

// Brings the rows of a tile to shared memory; zeros for those that do not count.
template <typename Shape, int kQueryBytes, int kHeadDim>
__device__ __forceinline__ void load_queries(const SplitCall& call, const Piece& piece, char* tile) {
  constexpr int kBytes = kHeadDim * kQueryBytes, kChunks = kBytes / 16;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kChunks; i += Shape::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    uint4 numbers = {0, 0, 0, 0};
    if (row < piece.num_rows) {
      const int64_t token = piece.first_token + piece.first_query + row / call.group;
      const int64_t head = piece.kv_head * call.group + row % call.group;
      numbers = *reinterpret_cast<const uint4*>(call.q + token * call.q_token + head * call.q_head + 16 * chunk);
    }
    *reinterpret_cast<uint4*>(tile + place_of<kBytes>(row, chunk)) = numbers;
  }
}

// Takes a warp's share of a piece's keys into its state.
template <typename Shape, int kHeadDim, typename Q, typename Stored>
__device__ __forceinline__ void attend(const SplitCall& call, const Piece& piece, const char* q, char* stages,
                                       bool is_fp8, State<kHeadDim>& state) {
  constexpr int kStep = Shape::kWarps * kTileKeys;
  const int first = piece.begin + static_cast<int>(threadIdx.x) / 32 * kTileKeys;
  Reader<Shape> reader{call, piece};
  reader.look_up(first);
  int stage = 0;  // that `ahead` goes to; the next one is the oldest
  for (int ahead = first; ahead - (Shape::kStages - 1) * kStep < piece.end; ahead += kStep) {
    const int key = ahead - (Shape::kStages - 1) * kStep;
    if (key >= first) wait_for_groups<Shape::kStages - 2>();
    sync_warp();  // all lanes' copies are there, and all lanes are done with the stage that is filled next
    if (ahead < piece.end) reader.fetch(stages + stage * Shape::kStageBytes);
    end_group();
    reader.look_up(ahead + kStep);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    if (key < first) continue;

    const char* const keys = stages + stage * Shape::kStageBytes;
    const char* const values = keys + kTileKeys * Shape::kRowBytes;
    const float* scales = nullptr;
    if (Shape::kScaled && call.k_scales != nullptr) scales = reinterpret_cast<const float*>(keys + Shape::kTileBytes);
    float weights[2][4] = {};
    if constexpr (kBytesOf<Q> == 4) {
      multiply_keys_fp32<kHeadDim>(weights, q, keys);
    } else {
      multiply_keys<kHeadDim>(weights, q, keys, is_fp8, Q{}, Stored{});
    }
    finish_scores(weights, call, piece, key, scales);
    weigh<kHeadDim>(weights, state);
    if (scales != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) weights[i / 4][i % 4] *= scales[kTileKeys + i / 4 * 8 + lane_id() % 4 * 2 + i % 2];
    }
    if constexpr (kBytesOf<Q> == 4) {
      add_values_fp32<kHeadDim>(state.sums, weights, values);
    } else {
      add_values<kHeadDim>(state.sums, weights, values, is_fp8, Q{}, Stored{});
    }
  }
  sync_warp();
}

template <typename Q, typename Stored, int kHeadDim>
__global__ void __launch_bounds__(Shape<kBytesOf<Q>, kBytesOf<Stored>, kHeadDim>::kThreads, kBlocksPerProcessor)
    split_keys_kernel(const __grid_constant__ SplitCall call, bool is_fp8) {
  using Shape = Shape<kBytesOf<Q>, kBytesOf<Stored>, kHeadDim>;
  char* const q = shared_memory();
  char* const stages = q + Shape::kQueryTile;
  float* const tops = reinterpret_cast<float*>(stages + Shape::kWarps * Shape::kStages * Shape::kStageBytes);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int num_works = call.plan[call.num_seqs] * call.width;
  for (int work = static_cast<int>(blockIdx.x); work < num_works; work += static_cast<int>(gridDim.x)) {
    const Piece piece = find_piece(call, work);
    if (piece.num_rows <= 0) continue;
    load_queries<Shape, kBytesOf<Q>, kHeadDim>(call, piece, q);
    sync_block();
    char* const own = stages + warp * Shape::kStages * Shape::kStageBytes;
    State<kHeadDim> state;
    attend<Shape, kHeadDim, Q, Stored>(call, piece, q, own, is_fp8, state);
    leave<kHeadDim>(state, reinterpret_cast<float*>(own), tops + warp * kTileRows * 2);
    sync_block();
    store_joined<Shape, kHeadDim>(call, piece, stages, tops);  // which is over before the next one's keys come
  }
}

// Calls launch(kernel, threads, bytes of shared memory, is_fp8) for the kernel of a kind of call; says whether there is one.
template <typename Launch>
bool with_kernel(Kind query, Kind stored, int64_t head_dim, const Launch& launch) {
  const auto sized = [&](auto type, auto cache, auto dim) {
    using Made = Shape<kBytesOf<decltype(type)>, kBytesOf<decltype(cache)>, dim.value>;
    launch(split_keys_kernel<decltype(type), decltype(cache), dim.value>, Made::kThreads, Made::kSharedBytes,
           stored == Kind::kFp8);
    return true;
  };
  const auto typed = [&](auto type, auto cache) {
    return head_dim == 64 ? sized(type, cache, Size<64>{}) : head_dim == 128 && sized(type, cache, Size<128>{});
  };
  if (query == Kind::kBf16 && (stored == Kind::kInt8 || stored == Kind::kFp8)) return typed(Bf16{}, Codes<Bf16>{});
  if (query != stored) return false;
  if (query == Kind::kFp16) return typed(Fp16{}, Fp16{});
  if (query == Kind::kFp32) return typed(0.0f, 0.0f);
  if (query != Kind::kBf16) return false;
  return head_dim == 256 ? sized(Bf16{}, Bf16{}, Size<256>{}) : typed(Bf16{}, Bf16{});
}

}  // namespace octavo_cuda
