// Formats with planes: weights whose codes have their low bits in one plane and their high bits in another, and whose
// scales may be whole numbers that multiply a block's own. `packed_planes.py` draws the layout.
//
// Every format's code comes out as a byte per input, whose weight is code * d + m. So there is one kind of product for all
// of them (matmul_planes.cpp, matmul_fma.cpp), and a format is what unpacks a group of 32 inputs.

#pragma once

#include "packed.h"

namespace octavo {

enum class Code {
  kBits,    // numbers of low and high bits
  kLevels,  // indices into a table of 16
  kDigits,  // digits of base 3, five in a byte
  kGrid,    // indices into a table of points
};

enum class UnitType { kHalf, kFloat, kNone };  // what d is stored as

struct Planes {
  int groups_of_block;   // groups of 32 inputs that share d
  int scales_of_group;   // numbers that d is multiplied by: none, one, or one for each half of the group
  bool minimum;          // a weight is code * d + m; without, (code - centre) * d
  bool nibble_scales;    // a byte has the scale in its low and the minimum in its high four bits
  int low_bits, high_bits;
  int centre;            // products subtract it from codes first, and put it back by m
  Code code = Code::kBits;
  UnitType unit = UnitType::kHalf;
  bool pair_scales = false;  // a byte has the scale of the first half in its low and that of the second in its high bits
  int bytes_of_codes = 0;    // of a block, for digits and grids
};

constexpr Planes planes_of(Format f) {
  switch (f) {
    case Format::kQ5_0: return {1, 0, false, false, 4, 1, 16};
    case Format::kQ5_1: return {1, 0, true, false, 4, 1, 16};
    case Format::kQ2_K: return {8, 2, true, true, 2, 0, 0};
    case Format::kQ3_K: return {8, 2, false, false, 2, 1, 4};
    case Format::kQ4_K: return {8, 1, true, false, 4, 0, 8};
    case Format::kQ5_K: return {8, 1, true, false, 4, 1, 16};
    case Format::kQ6_K: return {8, 2, false, false, 4, 2, 32};
    case Format::kIQ4_NL: return {1, 0, false, false, 4, 0, 128, Code::kLevels};
    case Format::kIQ4_XS: return {8, 1, false, false, 4, 0, 128, Code::kLevels};
    case Format::kMXFP4: return {1, 1, false, false, 4, 0, 12, Code::kLevels, UnitType::kNone};
    case Format::kNVFP4: return {2, 2, false, false, 4, 0, 12, Code::kLevels, UnitType::kNone};
    case Format::kQ8_K: return {8, 0, false, false, 8, 0, 128, Code::kBits, UnitType::kFloat};
    case Format::kTQ2_0: return {8, 0, false, false, 2, 0, 1};
    case Format::kTQ1_0: return {8, 0, false, false, 0, 0, 1, Code::kDigits, UnitType::kHalf, false, 52};
    case Format::kIQ2_XXS: return {8, 0, false, false, 0, 0, 64, Code::kGrid, UnitType::kHalf, false, 64};
    case Format::kIQ2_XS: return {8, 2, false, false, 0, 0, 64, Code::kGrid, UnitType::kHalf, true, 64};
    case Format::kIQ2_S: return {8, 2, false, false, 0, 0, 64, Code::kGrid, UnitType::kHalf, true, 72};
    case Format::kIQ3_XXS: return {8, 0, false, false, 0, 0, 64, Code::kGrid, UnitType::kHalf, false, 96};
    case Format::kIQ3_S: return {8, 1, false, false, 0, 0, 64, Code::kGrid, UnitType::kHalf, false, 104};
    case Format::kIQ1_S: return {8, 0, false, false, 0, 0, 16, Code::kGrid, UnitType::kHalf, false, 48};
    case Format::kIQ1_M: return {8, 2, false, false, 0, 0, 16, Code::kGrid, UnitType::kHalf, true, 48};
    default: return {};
  }
}

// Codes that any byte may be; others fit into seven bits.
constexpr bool is_wide(const Planes& p) { return p.centre > 64; }

// The levels of IQ4_NL and IQ4_XS, and 128 more.
constexpr uint8_t kLevels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
// Twice the values of e2m1, and 12 more.
constexpr uint8_t kFloatLevels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Where the parts of a block lie: d, m or its unit, scales, minimums, then the codes of one group after the other.
constexpr int64_t start_of_scales(const Planes& p) {
  const int64_t bytes_of_unit = p.unit == UnitType::kNone ? 0 : p.unit == UnitType::kFloat ? 4 : 2;
  return bytes_of_unit * kPanel * (p.minimum ? 2 : 1);
}
constexpr int64_t start_of_minimums(const Planes& p) {
  return start_of_scales(p) + kPanel * p.groups_of_block * p.scales_of_group / (p.pair_scales ? 2 : 1);
}
constexpr int64_t start_of_codes(const Planes& p) {
  const bool own_minimums = p.minimum && !p.nibble_scales;
  return start_of_minimums(p) + (own_minimums ? kPanel * p.groups_of_block * p.scales_of_group : 0);
}
constexpr int64_t bytes_of_codes(const Planes& p) {  // of a group
  if (p.bytes_of_codes > 0) return kPanel * p.bytes_of_codes / p.groups_of_block;
  return kPanel * kGroup * (p.low_bits + p.high_bits) / 8;
}
constexpr int64_t bytes_of_block(const Planes& p) {
  return start_of_codes(p) + p.groups_of_block * bytes_of_codes(p);
}
constexpr int64_t bytes_of_panel(const Planes& p, int64_t in_features) {
  return in_features / (kGroup * p.groups_of_block) * bytes_of_block(p);
}

// A group of 32 inputs times 32 outputs, unpacked: weight = code * d + m, with d and m of each half of the group, or with
// the first ones for all of it.
struct UnpackedGroup {
  uint8_t codes[kGroup * kPanel];  // [8 rows][32 outputs] words with a byte for each of four inputs
  float d[2][kPanel];
  float m[2][kPanel];
  float units[2][kPanel];  // where d and m are the whole numbers of scales and minimums: what these count (PairScales)
};

// What packing, lookups and products need to know of a format at run time.
struct PlaneFormat {
  Format format;
  Planes planes;
  int bytes_of_stored;  // of a block in a file
  void (*pack)(const uint8_t* stored, uint8_t* block, int column);  // one output's part of a block
  void (*unpack)(const uint8_t* block, int group, const uint8_t* grid, UnpackedGroup& out);
};
const PlaneFormat& plane_format(int64_t format);

}  // namespace octavo
