// Products of a tile of rows with 16 keys and 16 values in shared memory, by one warp.
//
// Lane 4g + t holds scores (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of keys 0-7 and the same of keys 8-15, as
// mma.m16n8k16 leaves them. Which of the 16 products of a sum a lane's operands belong to is free as long as both sides
// agree, so a lane takes 8 numbers that lie side by side, and no operand is moved between lanes:
//
//   scores: dims 8t..8t+7 of each 32, for two products
//   sums of values: lane's own dims 16t..16t+15 of each 64, those of weights' rows g and g + 8; operands are dims
//                   8g..8g+7 of keys 2t, 2t+1, 2t+8, 2t+9, for eight products
//
// Rows in shared memory are chunks of 16 bytes whose order is mixed by the row, so that the lanes that are served
// together find theirs in different banks.

#pragma once

#include "attention.h"

namespace octavo_cuda {

template <typename T>
struct Codes {};  // of one byte, whose numbers T holds exactly

template <typename Stored>
constexpr int kBytesOf = sizeof(Stored);
template <typename T>
constexpr int kBytesOf<Codes<T>> = 1;

// Where a chunk of a row of kRowBytes lies.
template <int kRowBytes>
__device__ __forceinline__ int place_of(int row, int chunk) {
  const int mixed = ((row & 6) ^ ((row & 1) << 2)) & (kRowBytes / 16 - 1);
  return row * kRowBytes + (chunk ^ mixed) * 16;
}

// Eight numbers of a row from `first` on, a multiple of 8, as four words of pairs.
template <int kHeadDim, typename T>
__device__ __forceinline__ uint4 load_pairs(const char* tile, int row, int first, bool, T) {
  return *reinterpret_cast<const uint4*>(tile + place_of<2 * kHeadDim>(row, first / 8));
}

// The number of a code of int8 that lies, plus 128, in the lowest byte of 2**23.
__device__ __forceinline__ float of_int8(uint32_t biased, int byte) {
  return __uint_as_float(take_bytes(biased, 0x4B000000u, 0x7440u | static_cast<uint32_t>(byte))) - 8388736.0f;
}

// The number of a code of e4m3 in the highest byte: its bits in those of fp32, whose exponent counts from -127.
__device__ __forceinline__ float of_fp8(uint32_t word) {
  if ((word & 0x7F000000u) == 0x7F000000u) return __uint_as_float(0x7FC00000u);
  return __uint_as_float((word & 0x80000000u) | (word >> 4 & 0x07F00000u)) * 0x1p120f;
}

template <typename T>
__device__ __forceinline__ uint2 pairs_of_codes(uint32_t word, bool is_fp8, T type) {
  if (is_fp8) {
    return uint2{pair_of(of_fp8(word << 24), of_fp8(word << 16), type), pair_of(of_fp8(word << 8), of_fp8(word), type)};
  }
  const uint32_t biased = word ^ 0x80808080u;
  return uint2{pair_of(of_int8(biased, 0), of_int8(biased, 1), type),
               pair_of(of_int8(biased, 2), of_int8(biased, 3), type)};
}

template <int kHeadDim, typename T>
__device__ __forceinline__ uint4 load_pairs(const char* tile, int row, int first, bool is_fp8, Codes<T>) {
  const char* const place = tile + place_of<kHeadDim>(row, first / 16) + first % 16;
  const uint2 words = *reinterpret_cast<const uint2*>(place);
  const uint2 low = pairs_of_codes(words.x, is_fp8, T{}), high = pairs_of_codes(words.y, is_fp8, T{});
  return uint4{low.x, low.y, high.x, high.y};
}

// Four numbers of a row of fp32 from `first` on, a multiple of 4.
template <int kHeadDim>
__device__ __forceinline__ float4 load_four(const char* tile, int row, int first) {
  return *reinterpret_cast<const float4*>(tile + place_of<4 * kHeadDim>(row, first / 4));
}

// scores += q keys^T.
template <int kHeadDim, typename T, typename Stored>
__device__ __forceinline__ void multiply_keys(float (&scores)[2][4], const char* q, const char* keys, bool is_fp8, T type,
                                              Stored stored) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 2
  for (int dims = 0; dims < kHeadDim; dims += 32) {
    const uint4 upper = load_pairs<kHeadDim>(q, g, dims + 8 * t, false, type);
    const uint4 lower = load_pairs<kHeadDim>(q, g + 8, dims + 8 * t, false, type);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 key = load_pairs<kHeadDim>(keys, 8 * half + g, dims + 8 * t, is_fp8, stored);
      multiply(scores[half], {upper.x, lower.x, upper.y, lower.y}, key.x, key.y, type);
      multiply(scores[half], {upper.z, lower.z, upper.w, lower.w}, key.z, key.w, type);
    }
  }
}

// sums += weights values.
template <int kHeadDim, typename T, typename Stored>
__device__ __forceinline__ void add_values(float (&sums)[kHeadDim / 8][4], const float (&weights)[2][4],
                                           const char* values, bool is_fp8, T type, Stored stored) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t rows[4] = {pair_of(weights[0][0], weights[0][1], type), pair_of(weights[0][2], weights[0][3], type),
                            pair_of(weights[1][0], weights[1][1], type), pair_of(weights[1][2], weights[1][3], type)};
#pragma unroll
  for (int dims = 0; dims < kHeadDim; dims += 64) {
    uint4 key[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      key[i] = load_pairs<kHeadDim>(values, 2 * t + i % 2 + i / 2 * 8, dims + 8 * g, is_fp8, stored);
    }
    const uint32_t words[4][4] = {{key[0].x, key[1].x, key[2].x, key[3].x},
                                  {key[0].y, key[1].y, key[2].y, key[3].y},
                                  {key[0].z, key[1].z, key[2].z, key[3].z},
                                  {key[0].w, key[1].w, key[2].w, key[3].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t(&word)[4] = words[i];
      multiply(sums[dims / 8 + 2 * i], rows, take_bytes(word[0], word[1], 0x5410), take_bytes(word[2], word[3], 0x5410),
               type);
      multiply(sums[dims / 8 + 2 * i + 1], rows, take_bytes(word[0], word[1], 0x7632),
               take_bytes(word[2], word[3], 0x7632), type);
    }
  }
}

// In fp32, which the hardware has no such products for, a lane computes what it holds.
template <int kHeadDim>
__device__ __forceinline__ void multiply_keys_fp32(float (&scores)[2][4], const char* q, const char* keys) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 2
  for (int dim = 0; dim < kHeadDim; dim += 4) {
    const float4 rows[2] = {load_four<kHeadDim>(q, g, dim), load_four<kHeadDim>(q, g + 8, dim)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 key = load_four<kHeadDim>(keys, 2 * t + i % 2 + i / 2 * 8, dim);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& score = scores[i / 2][2 * row + i % 2];
        score = fmaf(rows[row].x, key.x, score);
        score = fmaf(rows[row].y, key.y, score);
        score = fmaf(rows[row].z, key.z, score);
        score = fmaf(rows[row].w, key.w, score);
      }
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void add_values_fp32(float (&sums)[kHeadDim / 8][4], const float (&weights)[2][4],
                                                const char* values) {
  const int t = lane_id() % 4;
#pragma unroll 1
  for (int owner = 0; owner < 4; ++owner) {  // a lane that holds weights of these rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float upper = from_lane(weights[i / 2][i % 2], lane_id() - t + owner);
      const float lower = from_lane(weights[i / 2][2 + i % 2], lane_id() - t + owner);
#pragma unroll
      for (int dims = 0; dims < kHeadDim; dims += 16) {  // four of the lane's in each
        const int side = dims / 16 % 4 / 2, first = dims / 16 % 2 * 4;
        const int key = i / 2 * 8 + 2 * owner + i % 2;
        const float4 value = load_four<kHeadDim>(values, key, dims / 64 * 64 + 16 * t + 8 * side + first);
        const float numbers[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float(&sum)[4] = sums[dims / 64 * 8 + first + j];
          sum[side] = fmaf(upper, numbers[j], sum[side]);
          sum[2 + side] = fmaf(lower, numbers[j], sum[2 + side]);
        }
      }
    }
  }
}

}  // namespace octavo_cuda
