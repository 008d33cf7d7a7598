// rope_kv_write: norm and rotation of each token's queries and keys, and the write of its keys and values to the cache.

#include <cmath>

#include "cache.h"
#include "norm.h"
#include "ops.h"

namespace octavo {
namespace {

constexpr int64_t kTokensPerTask = 8;

// Rotates pairs (i, i + half) of x by cosines and sines [half] each.
void rotate_halves(float* x, const float* cosines, const float* sines, int64_t half) {
  float* y = x + half;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vf first = vload(x + i), second = vload(y + i), c = vload(cosines + i), s = vload(sines + i);
    vstore(x + i, vfnma(second, s, vmul(first, c)));
    vstore(y + i, vfma(first, s, vmul(second, c)));
  }
  for (; i < half; ++i) {
    const float first = x[i], second = y[i];
    x[i] = first * cosines[i] - second * sines[i];
    y[i] = second * cosines[i] + first * sines[i];
  }
}

void rotate_pairs(float* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[2 * i], second = x[2 * i + 1];
    x[2 * i] = first * cosines[i] - second * sines[i];
    x[2 * i + 1] = second * cosines[i] + first * sines[i];
  }
}

void turn_heads(const RopeKvWriteArgs& a, float* heads, int64_t num_heads, int64_t head_stride, const float* weight,
                const float* cos_sin) {
  const int64_t half = a.rot_dim / 2;
  for (int64_t head = 0; head < num_heads; ++head) {
    float* x = heads + head * head_stride;
    if (weight != nullptr) {
      scale_by_weight(x, weight, inverse_root_mean_square(x, a.head_dim, a.eps), 0.0f, a.head_dim, x);
    }
    a.interleaved ? rotate_pairs(x, cos_sin, cos_sin + half, half) : rotate_halves(x, cos_sin, cos_sin + half, half);
  }
}

template <class T>
void write_token(const RopeKvWriteArgs& a, int64_t token) {
  const int64_t slot = a.slot_mapping[token];
  if (slot < 0) return;
  const int64_t block = slot / a.block_size, offset = slot % a.block_size;
  const float* k = a.k + token * a.k_token_stride;
  const float* v = a.v + token * a.v_token_stride;
  T* k_slot = static_cast<T*>(a.k_cache) + block * a.k_block_stride + offset * a.k_slot_stride;
  T* v_slot = static_cast<T*>(a.v_cache) + block * a.v_block_stride + offset * a.v_slot_stride;
  for (int64_t head = 0; head < a.num_kv_heads; ++head) {
    convert(k + head * a.k_head_stride, a.head_dim, k_slot + head * a.k_cache_head_stride);
    convert(v + head * a.v_head_stride, a.head_dim, v_slot + head * a.v_cache_head_stride);
  }
}

// The largest magnitude of a vector; infinite or NaN if any element is. Magnitudes are in the order of their bits, NaN last.
float largest_of(const float* x, int64_t size) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// Rounds x / scale, half to even, to -127 .. 127; codes are 0 where the scale or its reciprocal is not finite.
void write_codes(const float* x, float scale, int64_t size, int8_t* codes) {
  const float inverse = 1.0f / scale;
  if (!(std::isfinite(scale) && std::isfinite(inverse))) {
    std::memset(codes, 0, size);
    return;
  }
  const vf high = vset(127.0f), low = vset(-127.0f);
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    float rounded[W];
    vstore(rounded, vmax(vmin(vround(vmul(vload(x + i), vset(inverse))), high), low));
    for (int j = 0; j < W; ++j) codes[i + j] = static_cast<int8_t>(rounded[j]);
  }
  for (; i < size; ++i) {
    const float rounded = std::nearbyint(x[i] * inverse);
    codes[i] = static_cast<int8_t>(!(rounded < 127.0f) ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
  }
}

// Where the scales of a slot's vectors are.
struct SlotScales {
  float* first;
  int64_t head_stride;
  bool known;

  // The scale of a head's vector, noted in its place unless it was known beforehand.
  float of(int64_t head, const float* x, int64_t size) const {
    float& scale = first[head * head_stride];
    if (!known) scale = largest_of(x, size) / 127.0f;
    return scale;
  }
};

void write_token_codes(const RopeKvWriteArgs& a, int64_t token) {
  const int64_t slot = a.slot_mapping[token];
  if (slot < 0) return;
  const int64_t block = slot / a.block_size, offset = slot % a.block_size;
  const float* k = a.k + token * a.k_token_stride;
  const float* v = a.v + token * a.v_token_stride;
  int8_t* k_slot = static_cast<int8_t*>(a.k_cache) + block * a.k_block_stride + offset * a.k_slot_stride;
  int8_t* v_slot = static_cast<int8_t*>(a.v_cache) + block * a.v_block_stride + offset * a.v_slot_stride;
  const bool known = a.known_scales != 0;
  const SlotScales k_scales{a.k_scale + (known ? 0 : block * a.k_scale_block_stride + offset * a.k_scale_slot_stride),
                            a.k_scale_head_stride, known};
  const SlotScales v_scales{a.v_scale + (known ? 0 : block * a.v_scale_block_stride + offset * a.v_scale_slot_stride),
                            a.v_scale_head_stride, known};
  for (int64_t head = 0; head < a.num_kv_heads; ++head) {
    const float* key = k + head * a.k_head_stride;
    const float* value = v + head * a.v_head_stride;
    write_codes(key, k_scales.of(head, key, a.head_dim), a.head_dim, k_slot + head * a.k_cache_head_stride);
    write_codes(value, v_scales.of(head, value, a.head_dim), a.head_dim, v_slot + head * a.v_cache_head_stride);
  }
}

void serve_token(const RopeKvWriteArgs& a, int64_t token) {
  if (!a.only_write) {
    const float* cos_sin = a.cos_sin + a.positions[token] * a.rot_dim;
    turn_heads(a, a.q + token * a.q_token_stride, a.num_heads, a.q_head_stride, a.q_norm_weight, cos_sin);
    turn_heads(a, a.k + token * a.k_token_stride, a.num_kv_heads, a.k_head_stride, a.k_norm_weight, cos_sin);
  }
  switch (static_cast<Dtype>(a.cache_dtype)) {
    case Dtype::kF32:
      return write_token<float>(a, token);
    case Dtype::kBF16:
      return write_token<BF16>(a, token);
    case Dtype::kF16:
      return write_token<F16>(a, token);
    case Dtype::kI8:
      return write_token_codes(a, token);
  }
}

}  // namespace

void rope_kv_write(const RopeKvWriteArgs& args, int64_t num_rows, Team& team) {
  const int64_t tokens_per_task = num_rows < kTokensPerTask * team.num_threads() ? 1 : kTokensPerTask;
  team.parallel_for((num_rows + tokens_per_task - 1) / tokens_per_task, [&](int64_t task) {
    const int64_t first = task * tokens_per_task;
    const int64_t end = first + tokens_per_task < num_rows ? first + tokens_per_task : num_rows;
    for (int64_t token = first; token < end; ++token) serve_token(args, token);
  });
}

}  // namespace octavo
