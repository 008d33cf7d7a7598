// Levels, scales and zeros of grouped weights in vectors.

#pragma once

#include "grouped.h"
#include "vec.h"

namespace octavo {

// A unit is the least number of inputs whose codes are read at once; a group is made of whole ones.
template <CodeKind K>
constexpr int kUnit = K == CodeKind::kTable4 ? 8 : K == CodeKind::kTable3 ? 32 : K == CodeKind::kTable2 ? 16 : 4;
template <CodeKind K>
constexpr int64_t kUnitBytes = K == CodeKind::kTable4 || K == CodeKind::kTable2 ? 4 * kPanel
                               : K == CodeKind::kTable3                         ? 12 * kPanel
                                                                                : 4 * kPanel;
constexpr int kLeastGroup = 8;  // inputs

constexpr float kUnitOfE4M3 = 256.0f;  // its levels come out divided by this

// ---- words of codes, and the 16 levels that they choose from --------------------------------------------------------

#if defined(__AVX512F__)
using CodeWords = __m512i;
struct LevelTable {
  vf levels;
  explicit LevelTable(const float* table) : levels(vload(table)) {}
};
OCTAVO_INLINE CodeWords load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
OCTAVO_INLINE CodeWords right(CodeWords x, int n) { return _mm512_srli_epi32(x, static_cast<unsigned>(n)); }
OCTAVO_INLINE CodeWords left(CodeWords x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
OCTAVO_INLINE CodeWords low_two_of(CodeWords x, CodeWords rest) {  // x's lowest two bits, the rest's others
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), x, rest, 0xCA);
}
OCTAVO_INLINE vf choose(const LevelTable& table, CodeWords codes) {  // by the low four bits of each word
  return _mm512_permutexvar_ps(codes, table.levels);
}
OCTAVO_INLINE vf load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBF80))));
}
OCTAVO_INLINE CodeWords load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OCTAVO_INLINE CodeWords repeat_code(int32_t x) { return _mm512_set1_epi32(x); }
OCTAVO_INLINE CodeWords plus(CodeWords x, CodeWords y) { return _mm512_add_epi32(x, y); }
OCTAVO_INLINE CodeWords masked(CodeWords x, int32_t mask) { return _mm512_and_si512(x, _mm512_set1_epi32(mask)); }
OCTAVO_INLINE CodeWords lanes_times(int32_t x) {
  return _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), repeat_code(x));
}
OCTAVO_INLINE vf gather(const float* from, CodeWords at) { return _mm512_i32gather_ps(at, from, 4); }
OCTAVO_INLINE vf number(CodeWords x) { return _mm512_cvtepi32_ps(x); }
OCTAVO_INLINE vf power(const uint8_t* p) {  // 2**(byte - 127)
  return _mm512_castsi512_ps(_mm512_max_epi32(left(load_bytes(p), 23), repeat_code(1 << 22)));
}
OCTAVO_INLINE vf load_shorts(const uint8_t* p) {
  return number(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif defined(__AVX2__)
using CodeWords = __m256i;
struct LevelTable {
  vf low, high;
  explicit LevelTable(const float* table) : low(vload(table)), high(vload(table + 8)) {}
};
OCTAVO_INLINE CodeWords load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
OCTAVO_INLINE CodeWords right(CodeWords x, int n) { return _mm256_srli_epi32(x, n); }
OCTAVO_INLINE CodeWords left(CodeWords x, int n) { return _mm256_slli_epi32(x, n); }
OCTAVO_INLINE CodeWords low_two_of(CodeWords x, CodeWords rest) {
  const __m256i two = _mm256_set1_epi32(3);
  return _mm256_or_si256(_mm256_and_si256(x, two), _mm256_andnot_si256(two, rest));
}
OCTAVO_INLINE vf choose(const LevelTable& table, CodeWords codes) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes), _mm256_permutevar8x32_ps(table.high, codes),
                          _mm256_castsi256_ps(left(codes, 28)));
}
OCTAVO_INLINE vf load_e4m3(const uint8_t* p) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xBF80))));
}
OCTAVO_INLINE CodeWords load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
OCTAVO_INLINE CodeWords repeat_code(int32_t x) { return _mm256_set1_epi32(x); }
OCTAVO_INLINE CodeWords plus(CodeWords x, CodeWords y) { return _mm256_add_epi32(x, y); }
OCTAVO_INLINE CodeWords masked(CodeWords x, int32_t mask) { return _mm256_and_si256(x, _mm256_set1_epi32(mask)); }
OCTAVO_INLINE CodeWords lanes_times(int32_t x) {
  return _mm256_mullo_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), repeat_code(x));
}
OCTAVO_INLINE vf gather(const float* from, CodeWords at) { return _mm256_i32gather_ps(from, at, 4); }
OCTAVO_INLINE vf number(CodeWords x) { return _mm256_cvtepi32_ps(x); }
OCTAVO_INLINE vf power(const uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_max_epi32(left(load_bytes(p), 23), repeat_code(1 << 22)));
}
OCTAVO_INLINE vf load_shorts(const uint8_t* p) {
  return number(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
using CodeWords = uint32_t __attribute__((vector_size(16)));
struct LevelTable {
  const float* levels;
  explicit LevelTable(const float* table) : levels(table) {}
};
OCTAVO_INLINE CodeWords load_codes(const uint8_t* p) {
  CodeWords words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
OCTAVO_INLINE CodeWords right(CodeWords x, int n) { return x >> n; }
OCTAVO_INLINE CodeWords left(CodeWords x, int n) { return x << n; }
OCTAVO_INLINE CodeWords low_two_of(CodeWords x, CodeWords rest) { return (x & 3u) | (rest & ~3u); }
OCTAVO_INLINE vf choose(const LevelTable& table, CodeWords codes) {
  vf levels;
  for (int i = 0; i < W; ++i) levels[i] = table.levels[codes[i] & 15u];
  return levels;
}
OCTAVO_INLINE vf load_e4m3(const uint8_t* p) {
  uint16_t halves[W];
  for (int i = 0; i < W; ++i) halves[i] = static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7);
  return vload_f16(halves);
}
OCTAVO_INLINE CodeWords load_bytes(const uint8_t* p) { return CodeWords{p[0], p[1], p[2], p[3]}; }
OCTAVO_INLINE CodeWords repeat_code(int32_t x) { return CodeWords{} + static_cast<uint32_t>(x); }
OCTAVO_INLINE CodeWords plus(CodeWords x, CodeWords y) { return x + y; }
OCTAVO_INLINE CodeWords masked(CodeWords x, int32_t mask) { return x & static_cast<uint32_t>(mask); }
OCTAVO_INLINE CodeWords lanes_times(int32_t x) { return CodeWords{0, 1, 2, 3} * static_cast<uint32_t>(x); }
OCTAVO_INLINE vf gather(const float* from, CodeWords at) { return vf{from[at[0]], from[at[1]], from[at[2]], from[at[3]]}; }
OCTAVO_INLINE vf number(CodeWords x) {
  vf values;
  for (int i = 0; i < W; ++i) values[i] = static_cast<float>(static_cast<int32_t>(x[i]));
  return values;
}
OCTAVO_INLINE vf power(const uint8_t* p) {
  vf values;
  for (int i = 0; i < W; ++i) {
    const uint32_t bits = p[i] == 0 ? 1u << 22 : static_cast<uint32_t>(p[i]) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    values[i] = value;
  }
  return values;
}
OCTAVO_INLINE vf load_shorts(const uint8_t* p) {
  int16_t shorts[W];
  std::memcpy(shorts, p, sizeof shorts);
  return vf{float(shorts[0]), float(shorts[1]), float(shorts[2]), float(shorts[3])};
}
#endif

// ---- levels ---------------------------------------------------------------------------------------------------------

template <CodeKind K>
struct Levels {
  LevelTable table;
  explicit Levels(const float* levels) : table(levels) {}
};

// The codes of 2W outputs by a unit's inputs, 4-bit and 2-bit ones: a field of a word for each input, lowest bits first.
template <CodeKind K>
struct Unit {
  static constexpr int kBits = K == CodeKind::kTable4 ? 4 : 2;
  CodeWords words[2];

  OCTAVO_INLINE void load(const uint8_t* unit, int column) {
    words[0] = load_codes(unit + 4 * column);
    words[1] = load_codes(unit + 4 * (column + W));
  }
  OCTAVO_INLINE vf level(const Levels<K>& levels, int j, int which) const {
    return choose(levels.table, right(words[which], kBits * j));
  }
};

// 3 bits: two words of the low two bits, then one of the high bits.
template <>
struct Unit<CodeKind::kTable3> {
  CodeWords low[2][2], high[2];

  OCTAVO_INLINE void load(const uint8_t* unit, int column) {
    for (int i = 0; i < 2; ++i) {
      const uint8_t* at = unit + 4 * (column + i * W);
      low[i][0] = load_codes(at);
      low[i][1] = load_codes(at + 4 * kPanel);
      high[i] = load_codes(at + 8 * kPanel);
    }
  }
  OCTAVO_INLINE vf level(const Levels<CodeKind::kTable3>& levels, int j, int which) const {
    const CodeWords top = j < 2 ? left(high[which], 2 - j) : right(high[which], j - 2);
    return choose(levels.table, low_two_of(right(low[which][j / 16], 2 * (j % 16)), top));
  }
};

// A byte for each input and output: rows of 32.
template <CodeKind K>
struct ByteUnit {
  const uint8_t* bytes;

  OCTAVO_INLINE void load(const uint8_t* unit, int column) { bytes = unit + column; }
  OCTAVO_INLINE vf level(const Levels<K>&, int j, int which) const {
    const uint8_t* at = bytes + j * kPanel + which * W;
    if constexpr (K == CodeKind::kInt8) return vload_i8(reinterpret_cast<const int8_t*>(at));
    if constexpr (K == CodeKind::kE4M3) return load_e4m3(at);
  }
};
template <>
struct Unit<CodeKind::kInt8> : ByteUnit<CodeKind::kInt8> {};
template <>
struct Unit<CodeKind::kE4M3> : ByteUnit<CodeKind::kE4M3> {};

// Writes a unit's levels: out [kUnit][32].
template <CodeKind K>
OCTAVO_INLINE void look_up(const Levels<K>& levels, const uint8_t* unit, float* out) {
#pragma GCC unroll 4
  for (int column = 0; column < kPanel; column += 2 * W) {
    Unit<K> codes;
    codes.load(unit, column);
#pragma GCC unroll 32
    for (int j = 0; j < kUnit<K>; ++j) {
      vstore(out + j * kPanel + column, codes.level(levels, j, 0));
      vstore(out + j * kPanel + column + W, codes.level(levels, j, 1));
    }
  }
}

// ---- scales and zeros -----------------------------------------------------------------------------------------------

struct ScaleReader {
  ScaleKind kind;
  const float* nested_table;
  const float* nested_scales;
  int shift;
  int32_t num_groups, first_scale;  // scales are counted row after row
  float offset;

  ScaleReader(const GroupedHeader& header, const uint8_t* begin, int64_t first_output)
      : kind(header.scales),
        nested_table(reinterpret_cast<const float*>(begin + header.nested_table_at)),
        nested_scales(reinterpret_cast<const float*>(begin + header.nested_scales_at)),
        shift(static_cast<int>(header.nested_shift)),
        num_groups(static_cast<int32_t>(header.num_groups)),
        first_scale(static_cast<int32_t>(first_output * header.num_groups)),
        offset(header.nested_offset) {}

  // The scales of W outputs from `column` on, for a group.
  OCTAVO_INLINE vf read(const uint8_t* scales, int64_t group, int column) const {
    const int64_t at = group * kPanel + column;
    switch (kind) {
      case ScaleKind::kF32: return vload(reinterpret_cast<const float*>(scales) + at);
      case ScaleKind::kF16: return vload_f16(reinterpret_cast<const uint16_t*>(scales) + at);
      case ScaleKind::kBF16: return vload_bf16(reinterpret_cast<const uint16_t*>(scales) + at);
      case ScaleKind::kE8M0: return power(scales + at);
      case ScaleKind::kE4M3: return vmul(load_e4m3(scales + at), vset(kUnitOfE4M3));
      case ScaleKind::kNested: {
        const CodeWords index =
            plus(lanes_times(num_groups), repeat_code(first_scale + column * num_groups + static_cast<int32_t>(group)));
        const vf inner = gather(nested_table, load_bytes(scales + at)), outer = gather(nested_scales, right(index, shift));
        return vadd(vmul(inner, outer), vset(offset));
      }
    }
    return vzero();
  }
};

// Fills out [32] with middle - zero.
OCTAVO_INLINE void read_zeros(const GroupedHeader& header, const uint8_t* zeros, int64_t group, float* out) {
  const vf middle = vset(header.middle);
  for (int column = 0; column < kPanel; column += W) {
    vf zero;
    if (header.zeros == ZeroKind::kShorts) {
      zero = load_shorts(zeros + 2 * (group * kPanel + column));
    } else if (header.zeros == ZeroKind::kBytes) {
      zero = number(load_bytes(zeros + group * kPanel + column));
    } else {
      const CodeWords bytes = load_bytes(zeros + group / 2 * kPanel + column);
      zero = number(group % 2 == 0 ? masked(bytes, 15) : right(bytes, 4));
    }
    vstore(out + column, vsub(middle, zero));
  }
}

}  // namespace octavo
