// The two halves of a root-mean-square norm of one vector; sums are made in an order that depends on the size alone.

#pragma once

#include <cmath>

#include "vec.h"

namespace octavo {

// 1 / sqrt(mean(x^2) + eps).
OCTAVO_INLINE float inverse_root_mean_square(const float* x, int64_t size, float eps) {
  vf sum[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const vf part = vload(x + i + j * W);
      sum[j] = vfma(part, part, sum[j]);
    }
  for (; i + W <= size; i += W) sum[0] = vfma(vload(x + i), vload(x + i), sum[0]);
  float total = vsum(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
  for (; i < size; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}

// out = x * factor * (offset + weight); out may be x.
OCTAVO_INLINE void scale_by_weight(const float* x, const float* weight, float factor, float offset, int64_t size,
                                   float* out) {
  int64_t i = 0;
  for (; i + W <= size; i += W)
    vstore(out + i, vmul(vmul(vload(x + i), vset(factor)), vadd(vset(offset), vload(weight + i))));
  for (; i < size; ++i) out[i] = x[i] * factor * (offset + weight[i]);
}

}  // namespace octavo
