// The largest product of a row, as it is found.

#pragma once

#include <limits>

#include "vec.h"

namespace octavo {

// The larger of two candidates; of equal ones the lower index, and NaN is larger than any number.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int32_t unused = 0;
  int64_t index = INT64_MAX;

  void take(float other, int64_t other_index) {
    const bool nan = value != value, other_nan = other != other;
    const bool larger = other_nan ? !nan : (!nan && other > value);
    const bool equal = other_nan ? nan : other == value;
    if (larger || (equal && other_index < index)) value = other, index = other_index;
  }
};

inline void take_tile(Best& best, const float* tile, int64_t first_index, int64_t num_columns) {
  vf largest = vload(tile);
  vf nan_if_any = vsub(largest, largest);
  for (int64_t c = W; c + W <= num_columns; c += W) {
    const vf values = vload(tile + c);
    largest = vmax(largest, values);
    nan_if_any = vadd(nan_if_any, vsub(values, values));
  }
  const bool finite = vsum(nan_if_any) == 0.0f && num_columns % W == 0;
  if (finite && vmax_of(largest) < best.value) return;  // mostly: nothing here is as large
  for (int64_t c = 0; c < num_columns; ++c) best.take(tile[c], first_index + c);
}

}  // namespace octavo
