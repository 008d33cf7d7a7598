// gated: an activation of the first half of each row, times the second half.

#include "ops.h"
#include "vmath.h"

namespace octavo {
namespace {

constexpr int64_t kColumnsPerTask = 2048;  // a multiple of every vector's width; some 2000 cycles

enum Activation : int64_t { kSilu = 0, kGeluErf = 1, kGeluTanh = 2 };

template <int64_t activation>
OCTAVO_INLINE vf activate(vf x) {
  if (activation == kSilu) return vmul(x, vlogistic(x));
  if (activation == kGeluErf) return vmul(x, vnormal_cdf(x));
  // 0.5 * (1 + tanh(y)) is the logistic function of 2 y.
  const vf cubic = vfma(vmul(vset(0.044715f), vmul(x, x)), x, x);
  return vmul(x, vlogistic(vmul(vset(1.59576912f), cubic)));
}

template <int64_t activation>
void gate(const float* x, const float* up, float* out, int64_t size) {
  int64_t i = 0;
  for (; i + W <= size; i += W) vstore(out + i, vmul(activate<activation>(vload(x + i)), vload(up + i)));
  if (i == size) return;
  float rest[2][W] = {};
  std::memcpy(rest[0], x + i, (size - i) * sizeof(float));
  std::memcpy(rest[1], up + i, (size - i) * sizeof(float));
  vstore(rest[0], vmul(activate<activation>(vload(rest[0])), vload(rest[1])));
  std::memcpy(out + i, rest[0], (size - i) * sizeof(float));
}

}  // namespace

void gated(const GatedArgs& a, int64_t num_rows, Team& team) {
  const int64_t parts = (a.size + kColumnsPerTask - 1) / kColumnsPerTask;
  team.parallel_for(num_rows * parts, [&](int64_t task) {
    const int64_t row = task / parts, first = task % parts * kColumnsPerTask;
    const int64_t size = a.size - first < kColumnsPerTask ? a.size - first : kColumnsPerTask;
    const float* x = a.x + row * a.x_stride + first;
    float* out = a.out + row * a.out_stride + first;
    if (a.activation == kSilu) return gate<kSilu>(x, x + a.size, out, size);
    if (a.activation == kGeluErf) return gate<kGeluErf>(x, x + a.size, out, size);
    return gate<kGeluTanh>(x, x + a.size, out, size);
  });
}

}  // namespace octavo
