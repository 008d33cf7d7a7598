// The layout of packed weights, and the values in it. `packed_weight.py` draws it.
//
// Outputs stand in panels of 32, zero weights after the last. A panel is contiguous: for dense formats 32 values per
// input; for block formats, per group of 32 inputs, 32 scales (f16), for Q4_1 32 minima (f16), then the codes: 32-bit
// words, one per output, in rows of 32 words. Byte b of a word in row i holds the codes of inputs 8i + b (low nibble) and
// 8i + 4 + b (high nibble) for 4-bit formats, and code + 128 of input 4i + b for Q8_0.

#pragma once

#include <cstdint>
#include <type_traits>

#include "ops.h"
#include "vec.h"

namespace octavo {

constexpr int kPanel = 32;  // outputs in a panel
constexpr int kGroup = 32;  // inputs that share a scale

using Format = WeightFormat;

constexpr bool is_dense(Format f) { return f == Format::kF32 || f == Format::kBF16 || f == Format::kF16; }
constexpr int bits_of_code(Format f) { return f == Format::kQ8_0 ? 8 : 4; }
constexpr int64_t bytes_of_scales(Format f) { return f == Format::kQ4_1 ? 4 * kPanel : 2 * kPanel; }
constexpr int64_t bytes_of_group(Format f) { return bytes_of_scales(f) + kPanel * kGroup * bits_of_code(f) / 8; }
constexpr int64_t bytes_of_value(Format f) { return f == Format::kF32 ? 4 : 2; }

constexpr int64_t bytes_of_panel(Format f, int64_t in_features) {
  return is_dense(f) ? in_features * kPanel * bytes_of_value(f) : in_features / kGroup * bytes_of_group(f);
}

template <Format F>
using FormatTag = std::integral_constant<Format, F>;

// Formats whose codes lie in planes: planes.h has them, and none of the templates here.
constexpr bool has_planes(int64_t format) { return format >= static_cast<int64_t>(Format::kQ5_0); }

// Calls function(FormatTag<F>{}) for the format F without planes that a number names.
template <class Function>
void with_format(int64_t format, Function&& function) {
  switch (static_cast<Format>(format)) {
    case Format::kF32: return function(FormatTag<Format::kF32>{});
    case Format::kBF16: return function(FormatTag<Format::kBF16>{});
    case Format::kF16: return function(FormatTag<Format::kF16>{});
    case Format::kQ4_0: return function(FormatTag<Format::kQ4_0>{});
    case Format::kQ4_1: return function(FormatTag<Format::kQ4_1>{});
    case Format::kQ8_0: return function(FormatTag<Format::kQ8_0>{});
    default: return;
  }
}

// Asks for memory that will be read soon: products leave the processor no time to find out by itself.
OCTAVO_INLINE void prefetch(const uint8_t* p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(p + i);
}
// The same into the second cache, where memory is all that is waited for: the first one has few reads under way at a time.
OCTAVO_INLINE void prefetch_to_second(const uint8_t* p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}
// Asks for the lines that begin in bytes first .. stop - 1 from p on, which begins a line.
OCTAVO_INLINE void prefetch_lines(const uint8_t* p, int64_t first, int64_t stop) {
  for (int64_t i = (first + 63) / 64 * 64; i < stop; i += 64) __builtin_prefetch(p + i);
}

OCTAVO_INLINE uint16_t read_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

OCTAVO_INLINE float f16_value(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  return f16_to_float(bits);
#endif
}

}  // namespace octavo
