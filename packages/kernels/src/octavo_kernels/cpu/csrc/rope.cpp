// rope_kv_write: norm and rotation of each token's queries and keys, and the write of its keys and values to the cache.

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
      return;  // keys are scaled before they are written as int8, which is no part of this op
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
