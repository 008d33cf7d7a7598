// Codes and scales out of a block with planes, in vectors.

#pragma once

#include "grid_codes.h"

namespace octavo {

// ---- a group out of a block -----------------------------------------------------------------------------------------

// The codes of W outputs in a group, a byte per input.
template <Format F>
struct PlaneCodes {
  static constexpr Planes kPlanes = planes_of(F);
  const uint8_t* words;

  OCTAVO_INLINE PlaneCodes(const uint8_t* block, int group, int column, const uint8_t* /*grid*/)
      : words(block + start_of_codes(kPlanes) + group * bytes_of_codes(kPlanes) + 4 * column) {}

  // Inputs 4 Row .. 4 Row + 3.
  template <int Row>
  OCTAVO_INLINE Words row() const {
    constexpr int kLowRows = 8 / kPlanes.low_bits;  // rows of bytes that a row of words holds
    const Words low = load_words(words + Row / kLowRows * 4 * kPanel);
    constexpr auto kLowMask = static_cast<int32_t>(((1u << kPlanes.low_bits) - 1) * 0x01010101u);
    Words code = both(shift<-kPlanes.low_bits * (Row % kLowRows)>(low), repeat(kLowMask));
    if constexpr (kPlanes.code == Code::kLevels)
      code = levels(code, kPlanes.unit == UnitType::kNone ? kFloatLevels : kLevels);
    if constexpr (kPlanes.high_bits > 0) {
      constexpr int kHighRows = 8 / kPlanes.high_bits;
      constexpr int kHighMask = ((1 << kPlanes.high_bits) - 1) * 0x01010101 << kPlanes.low_bits;
      const Words high = load_words(words + (8 / kLowRows + Row / kHighRows) * 4 * kPanel);
      code = either(code, both(shift<kPlanes.low_bits - kPlanes.high_bits * (Row % kHighRows)>(high), repeat(kHighMask)));
    }
    return code;
  }
};

template <Format F>
using CodesOf = std::conditional_t<F == Format::kTQ1_0, DigitCodes,
                                   std::conditional_t<planes_of(F).code == Code::kGrid, GridCodes<F>, PlaneCodes<F>>>;

// The scale of W outputs in a group, or in a half of it: weight = code * d + m.
struct PlaneScale {
  vf d, m;
};

// The d of W outputs in a group, or in a half of it.
template <Format F>
OCTAVO_INLINE vf plane_d(const uint8_t* block, int group, int half, int column) {
  constexpr Planes kPlanes = planes_of(F);
  const uint8_t* scales = block + start_of_scales(kPlanes) + column;
  const uint8_t* scale = scales + (group * kPlanes.scales_of_group + half) * kPanel;
  if constexpr (F == Format::kMXFP4) return vload_e8m0(scale);
  if constexpr (F == Format::kNVFP4) return vmul(vload_e4m3(scale), vset(0.5f));
  if constexpr (kPlanes.unit == UnitType::kFloat) return vload(reinterpret_cast<const float*>(block) + column);
  const vf d = vload_f16(reinterpret_cast<const uint16_t*>(block) + column);
  if constexpr (kPlanes.pair_scales) {
    const vf number = vload_nibbles(scales + group * kPanel, half == 1);
    if constexpr (F == Format::kIQ1_M) return vmul(d, vmul(number, vset(0.125f)));
    return vmul(d, vmul(vadd(number, vset(0.5f)), vset(0.25f)));
  }
  if constexpr (F == Format::kIQ2_XXS || F == Format::kIQ3_XXS || F == Format::kIQ1_S) {
    constexpr float kFactor = F == Format::kIQ1_S ? 0.125f : F == Format::kIQ2_XXS ? 0.25f : 0.5f;
    return vmul(d, vmul(GridCodes<F>(block, group, column, nullptr).own_scale(), vset(kFactor)));
  }
  if constexpr (kPlanes.nibble_scales) return vmul(d, vload_nibbles(scale, false));
  if constexpr (kPlanes.scales_of_group > 0) return vmul(d, vload_i8(reinterpret_cast<const int8_t*>(scale)));
  return d;
}

template <Format F>
OCTAVO_INLINE PlaneScale plane_scale(const uint8_t* block, int group, int half, int column) {
  constexpr Planes kPlanes = planes_of(F);
  const auto* units = reinterpret_cast<const uint16_t*>(block) + column;
  const uint8_t* scales = block + start_of_scales(kPlanes) + (group * kPlanes.scales_of_group + half) * kPanel + column;
  PlaneScale scale{plane_d<F>(block, group, half, column), vzero()};
  if constexpr (!kPlanes.minimum) {
    scale.m = vmul(scale.d, vset(static_cast<float>(-kPlanes.centre)));
  } else if constexpr (kPlanes.scales_of_group == 0) {
    scale.m = vload_f16(units + kPanel);
  } else {
    const uint8_t* minimums = scales + (start_of_minimums(kPlanes) - start_of_scales(kPlanes));
    const vf number = kPlanes.nibble_scales ? vload_nibbles(scales, true)
                                            : vload_i8(reinterpret_cast<const int8_t*>(minimums));
    scale.m = vmul(vsub(vset(-0.0f), vload_f16(units + kPanel)), number);
  }
  return scale;
}

}  // namespace octavo
