// rms_norm: root-mean-square norms of rows, with or without the addition of the residual.

#include "norm.h"

#include "ops.h"

namespace octavo {
namespace {

constexpr int64_t kRowsPerTask = 8;

void norm_row(const RmsNormArgs& a, int64_t row) {
  const float* x = a.x + row * a.x_stride;
  if (a.residual != nullptr) {
    float* residual = a.residual + row * a.residual_stride;
    int64_t i = 0;
    for (; i + W <= a.size; i += W) vstore(residual + i, vadd(vload(residual + i), vload(x + i)));
    for (; i < a.size; ++i) residual[i] += x[i];
    x = residual;
  }
  const float factor = inverse_root_mean_square(x, a.size, a.eps);
  scale_by_weight(x, a.weight, factor, a.offset, a.size, a.out + row * a.out_stride);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int64_t num_rows, Team& team) {
  const int64_t rows_per_task = num_rows < kRowsPerTask * team.num_threads() ? 1 : kRowsPerTask;
  team.parallel_for((num_rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t end = (task + 1) * rows_per_task < num_rows ? (task + 1) * rows_per_task : num_rows;
    for (int64_t row = task * rows_per_task; row < end; ++row) norm_row(args, row);
  });
}

}  // namespace octavo
