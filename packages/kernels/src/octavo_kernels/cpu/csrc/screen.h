// Screening: products of inputs rounded to one digit say which outputs may be the largest of a row, and only those are
// computed in full.
//
// Such a product is off by that of the weights with what the rounding took from the inputs, which is at most the norm of
// one times the norm of the other (Cauchy and Schwarz). Both products are rounded besides, as sums of in_features terms
// whose magnitudes add up to no more than the norms of inputs and weights: in formats where a weight is one product.

#pragma once

#include <cmath>

#include "matmul_inputs.h"
#include "rounding.h"

namespace octavo {

constexpr int64_t kLeastScreened = 3;  // with fewer rows products wait for the weights anyhow

// Whether products of some rows are screened: with norms, of formats that bytes multiply and that have no minimums. Without
// vectors of bytes rounded products are the slower ones.
inline bool are_screened(const float* norms, int64_t format, int64_t num_rows) {
  if (W == 4 || norms == nullptr || num_rows < kLeastScreened || is_grouped(format)) return false;
  if (has_planes(format)) return !plane_format(format).planes.minimum;
  return format == static_cast<int64_t>(Format::kQ4_0) || format == static_cast<int64_t>(Format::kQ8_0);
}

// How far the product of a row and weights of norm 1 can be from that of the rounded row; not finite if an input is not.
inline float screening_error(const float* x, int64_t in_features) {
  double lost = 0.0, whole = 0.0;  // squares, which in fp32 might be 0
  for (const float* group = x; group < x + in_features; group += kGroup) {
    const Inputs inputs(group);
    const float largest = inputs.largest();
    if (!(largest < INFINITY)) return INFINITY;
    const Unit unit = unit_of<1>(largest);
    int8_t digits[1][kGroup];
    int32_t sum = 0, sum_low = 0;
    inputs.round(unit.inverse, digits, sum, sum_low);
    for (int i = 0; i < kGroup; ++i) {
      const double value = group[i], rest = value - static_cast<double>(unit.scale) * digits[0][i];
      lost += rest * rest;
      whole += value * value;
    }
  }
  constexpr double kSmallest = 1e-28;  // where fp32 has no digits left
  const double rounding = static_cast<double>(2 * in_features + 64) * 0x1p-24;
  return static_cast<float>((std::sqrt(lost) + rounding * std::sqrt(whole)) * (1.0 + 0x1p-20) + kSmallest);
}

// The products of one row in full, a panel at a time.
class RowInFull {
 public:
  // memory: of this thread, with room for a panel behind its scratch.
  RowInFull(const Product& product, const Method& method, int64_t row, const Memory& memory)
      : product_(product), method_(method), memory_(memory) {
    product_.x += row * product.x_stride;
    product_.num_rows = 1;
    product_.rounded = memory.rounded;
    round_some(method, product_, 0, 1, memory.rounded);
  }

  // Valid until the next call.
  const float* panel(int64_t index) const {
    auto* out = reinterpret_cast<float*>(memory_.scratch + kScratchBytes);
    method_.part(product_, {0, 1, index, 1, index + 1, out, kPanel}, memory_.scratch);
    return out;
  }

 private:
  Product product_;
  const Method& method_;
  const Memory& memory_;
};

}  // namespace octavo
