// Grouped weights: codes of 2, 3, 4 or 8 bits, what each code stands for, and a scale for every group of inputs, as the
// checkpoints of Hugging Face have them. `grouped_weight.py` draws the layout.
//
//     weight = (level(code) + middle - zero) * scale
//
// A level is one of a table of 16, a whole number of 8 bits or a float of 8 bits. All that differs from format to format
// stands in a header at the beginning of the weight, so that products need no other arguments than a dense one's.

#pragma once

#include "packed.h"

namespace octavo {

enum class CodeKind : int64_t { kTable4 = 0, kTable3 = 1, kTable2 = 2, kInt8 = 3, kE4M3 = 4 };
enum class ScaleKind : int64_t { kF32 = 0, kF16 = 1, kBF16 = 2, kE8M0 = 3, kE4M3 = 4, kNested = 5 };
enum class ZeroKind : int64_t { kNone = 0, kNibbles = 1, kBytes = 2, kShorts = 3 };
enum class FinishKind : int64_t { kNone = 0, kTimes = 1, kOver = 2 };

struct GroupedHeader {
  CodeKind codes;
  ScaleKind scales;
  ZeroKind zeros;
  FinishKind finish;       // what products undergo at last, by `factor`
  int64_t padded_inputs;   // in_features, up to a multiple of 32
  int64_t group_inputs;    // the last group may have fewer
  int64_t num_groups;
  int64_t panels_at;       // in bytes from the header's begin
  int64_t panel_bytes;     // of a panel: the codes, then
  int64_t scales_at;       // [num_groups][32] scales, in bytes from the panel's begin
  int64_t zeros_at;        // [num_groups][32] zeros; nibbles: [num_groups / 2][32], the even group in the low bits
  int64_t order_at;        // [in_features] int32, the input that stands at each place; 0: inputs stand as they come
  int64_t nested_table_at;   // [256] fp32, what a scale's byte stands for, in bytes from the header's begin
  int64_t nested_scales_at;  // [..] fp32, the scale of 2**nested_shift scales, which are counted row after row
  int64_t nested_shift;
  float nested_offset;
  float factor;
  float middle;
  float unused;
  float table[16];  // table levels; of codes with fewer bits repeated

  const uint8_t* panel(int64_t index) const {
    return reinterpret_cast<const uint8_t*>(this) + panels_at + index * panel_bytes;
  }
};

// What a group of 32 inputs takes in a prepared row: its inputs, and room for sums of groups of at least 8 inputs.
constexpr int64_t kPreparedBytes = 160;

}  // namespace octavo
