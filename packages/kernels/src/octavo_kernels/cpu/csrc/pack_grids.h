// One output's part of a block whose codes are points of a grid, or ternary digits, as grid_codes.h reads it.

#pragma once

#include "grid_codes.h"

namespace octavo {

OCTAVO_INLINE uint32_t read_u32(const uint8_t* p) { return read_u16(p) | static_cast<uint32_t>(read_u16(p + 2)) << 16; }
OCTAVO_INLINE void write_u16(uint8_t* p, uint32_t value) {
  p[0] = static_cast<uint8_t>(value);
  p[1] = static_cast<uint8_t>(value >> 8);
}
OCTAVO_INLINE void write_u32(uint8_t* p, uint32_t value) {
  write_u16(p, value);
  write_u16(p + 2, value >> 16);
}

// The codes of group g: numbers of points, then what else grid_codes.h lists.
template <Format F>
void pack_points(const uint8_t* stored, int g, uint8_t* codes, int column) {
  uint8_t* rest = codes + kNumberBytes(F) * kPanel;
  const auto numbers = [&](int four, const uint8_t* bytes) {
    std::memcpy(codes + four * 4 * kPanel + 4 * column, bytes, 4);
  };
  if constexpr (F == Format::kIQ2_XXS) {
    numbers(0, stored + 2 + 8 * g);
    std::memcpy(rest + 4 * column, stored + 6 + 8 * g, 4);
  }
  if constexpr (F == Format::kIQ2_XS) {
    uint8_t low[4];
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t point = read_u16(stored + 2 + 8 * g + 2 * i);
      low[i] = static_cast<uint8_t>(point);
      word |= (point >> 9) << (7 * i) | ((point >> 8) & 1u) << (28 + i);
    }
    numbers(0, low);
    write_u32(rest + 4 * column, word);
  }
  if constexpr (F == Format::kIQ2_S) {
    numbers(0, stored + 2 + 4 * g);
    std::memcpy(rest + 4 * column, stored + 34 + 4 * g, 4);
    rest[4 * kPanel + column] = stored[66 + g];
  }
  if constexpr (F == Format::kIQ3_XXS || F == Format::kIQ3_S) {
    numbers(0, stored + 2 + 8 * g);
    numbers(1, stored + 6 + 8 * g);
    std::memcpy(rest + 4 * column, stored + (F == Format::kIQ3_XXS ? 66 : 74) + 4 * g, 4);
    if constexpr (F == Format::kIQ3_S) rest[4 * kPanel + column] = stored[66 + g];
  }
  if constexpr (F == Format::kIQ1_S) {
    numbers(0, stored + 2 + 4 * g);
    std::memcpy(rest + 2 * column, stored + 34 + 2 * g, 2);
  }
  if constexpr (F == Format::kIQ1_M) {
    numbers(0, stored + 4 * g);
    std::memcpy(rest + 2 * column, stored + 32 + 2 * g, 2);
  }
}

// The scales of group g where they have a part of their own: one byte.
template <Format F>
uint8_t packed_scale(const uint8_t* stored, int g) {
  if constexpr (F == Format::kIQ2_XS) return stored[66 + g];
  if constexpr (F == Format::kIQ2_S) return stored[74 + g];
  if constexpr (F == Format::kIQ3_S) return static_cast<uint8_t>(2 * ((stored[106 + g / 2] >> (g % 2 * 4)) & 15) + 1);
  // IQ1_M: three bits for each half, four of them in the low bits of a word; 2 * scale + 1 fits into four.
  const uint32_t bits = read_u16(stored + 48 + g / 2 * 2) >> (g % 2 * 6);
  return static_cast<uint8_t>(((bits & 7) << 1 | 1) | ((bits >> 3 & 7) << 1 | 1) << 4);
}

template <Format F>
void pack_grid(const uint8_t* stored, uint8_t* block, int column) {
  constexpr Planes kPlanes = planes_of(F);
  if constexpr (F == Format::kIQ1_M) {  // the f16 lies in the high four bits of four words, the lowest four first
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(read_u16(stored + 48 + 2 * i) >> 12) << (4 * i);
    write_u16(block + 2 * column, d);
  } else {
    std::memcpy(block + 2 * column, stored, 2);
  }
  for (int g = 0; g < kPlanes.groups_of_block; ++g) {
    if constexpr (kPlanes.scales_of_group > 0)
      block[start_of_scales(kPlanes) + g * kPanel + column] = packed_scale<F>(stored, g);
    pack_points<F>(stored, g, block + start_of_codes(kPlanes) + g * bytes_of_codes(kPlanes), column);
  }
}

// TQ1_0: 32 bytes whose first digits are 32 inputs, their second ones the next 32, five in all; the same with 16 bytes;
// and four bytes of four digits.
inline void pack_digits(const uint8_t* stored, uint8_t* block, int column) {
  uint8_t digits[256];
  uint8_t* out = digits;
  const auto run = [&](const uint8_t* bytes, int num_bytes, int num_digits) {
    unsigned power = 1;
    for (int digit = 0; digit < num_digits; ++digit, power *= 3)
      for (int i = 0; i < num_bytes; ++i) *out++ = static_cast<uint8_t>((bytes[i] * power & 255u) * 3 >> 8);
  };
  run(stored, 32, 5);
  run(stored + 32, 16, 5);
  run(stored + 48, 4, 4);
  std::memcpy(block + 2 * column, stored + 52, 2);
  uint8_t* words = block + start_of_codes(planes_of(Format::kTQ1_0)) + 4 * column;
  for (int row = 0; row < 13; ++row)
    for (int b = 0; b < 4; ++b) {
      unsigned value = 0;
      for (int digit = 0; digit < 5; ++digit) {
        const int k = 4 * (5 * row + digit) + b;
        value = 3 * value + (k < 256 ? digits[k] : 0u);
      }
      words[row * 4 * kPanel + b] = static_cast<uint8_t>((value * 256 + 242) / 243);
    }
}

}  // namespace octavo
