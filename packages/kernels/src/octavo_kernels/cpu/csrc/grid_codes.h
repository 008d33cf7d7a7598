// Codes that are points of a grid, and ternary digits, out of a block in vectors. `packed_parts.py` draws the layouts.
//
// A grid is a table of points with a byte per coordinate, four of them (IQ3) or eight, made by `packed_parts.py`: magnitudes
// where signs are stored, and for IQ1 8 * coordinate + 15, to which 2 are added where the file adds an eighth to a point.

#pragma once

#include "plane_words.h"

namespace octavo {

// ---- words ----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
OCTAVO_INLINE Words load_bytes(const uint8_t* p) {  // a byte for each lane
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OCTAVO_INLINE Words load_halves(const uint8_t* p) {  // 16 bits for each lane
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
OCTAVO_INLINE Words look_up(const uint8_t* table, Words offsets) { return _mm512_i32gather_epi32(offsets, table, 1); }
OCTAVO_INLINE Words each_16(const uint8_t* bytes) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
OCTAVO_INLINE Words permute(Words x, Words places) { return _mm512_shuffle_epi8(x, places); }
OCTAVO_INLINE Words differ(Words x, Words y) { return _mm512_xor_si512(x, y); }
// x where the byte of `bits` has no bit of `mask`, else -x; and `centre` more.
OCTAVO_INLINE Words with_signs(Words x, Words bits, Words mask, Words centre) {
  return _mm512_mask_sub_epi8(_mm512_add_epi32(centre, x), _mm512_test_epi8_mask(bits, mask), centre, x);
}
OCTAVO_INLINE Words times(Words x, int factor) {  // of 16 bits each
  return _mm512_mullo_epi16(x, _mm512_set1_epi16(static_cast<int16_t>(factor)));
}
OCTAVO_INLINE Words upper_bytes(Words x) { return _mm512_srli_epi16(x, 8); }
#elif defined(__AVX2__)
OCTAVO_INLINE Words load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
OCTAVO_INLINE Words load_halves(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OCTAVO_INLINE Words look_up(const uint8_t* table, Words offsets) {
  return _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), offsets, 1);
}
OCTAVO_INLINE Words each_16(const uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
OCTAVO_INLINE Words permute(Words x, Words places) { return _mm256_shuffle_epi8(x, places); }
OCTAVO_INLINE Words differ(Words x, Words y) { return _mm256_xor_si256(x, y); }
OCTAVO_INLINE Words with_signs(Words x, Words bits, Words mask, Words centre) {
  const Words minus = _mm256_cmpeq_epi8(_mm256_and_si256(bits, mask), mask);  // all bits of a byte, which is -1
  return _mm256_add_epi8(centre, _mm256_sub_epi8(_mm256_xor_si256(x, minus), minus));
}
OCTAVO_INLINE Words times(Words x, int factor) {
  return _mm256_mullo_epi16(x, _mm256_set1_epi16(static_cast<int16_t>(factor)));
}
OCTAVO_INLINE Words upper_bytes(Words x) { return _mm256_srli_epi16(x, 8); }
#else
OCTAVO_INLINE Words load_bytes(const uint8_t* p) { return Words{p[0], p[1], p[2], p[3]}; }
OCTAVO_INLINE Words load_halves(const uint8_t* p) {
  return Words{read_u16(p), read_u16(p + 2), read_u16(p + 4), read_u16(p + 6)};
}
OCTAVO_INLINE Words look_up(const uint8_t* table, Words offsets) {
  Words found = {};
  for (int i = 0; i < W; ++i) {
    uint32_t word;
    std::memcpy(&word, table + offsets[i], sizeof word);
    found[i] = word;
  }
  return found;
}
OCTAVO_INLINE Words each_16(const uint8_t* bytes) { return load_words(bytes); }
OCTAVO_INLINE Words permute(Words x, Words places) {
  uint8_t from[16], to[16];
  std::memcpy(from, &x, 16);
  std::memcpy(to, &places, 16);
  for (uint8_t& byte : to) byte = from[byte & 15];
  std::memcpy(&x, to, 16);
  return x;
}
OCTAVO_INLINE Words differ(Words x, Words y) { return x ^ y; }
OCTAVO_INLINE Words with_signs(Words x, Words bits, Words mask, Words centre) {
  uint8_t values[16], signs[16], wanted[16], middle[16];
  std::memcpy(values, &x, 16);
  std::memcpy(signs, &bits, 16);
  std::memcpy(wanted, &mask, 16);
  std::memcpy(middle, &centre, 16);
  for (int i = 0; i < 16; ++i)
    values[i] = static_cast<uint8_t>((signs[i] & wanted[i]) != 0 ? middle[i] - values[i] : middle[i] + values[i]);
  std::memcpy(&x, values, 16);
  return x;
}
OCTAVO_INLINE Words times(Words x, int factor) {
  uint16_t halves[8];
  std::memcpy(halves, &x, 16);
  for (uint16_t& half : halves) half = static_cast<uint16_t>(half * static_cast<unsigned>(factor));
  std::memcpy(&x, halves, 16);
  return x;
}
OCTAVO_INLINE Words upper_bytes(Words x) { return (x >> 8) & repeat(0x00FF00FF); }
#endif

OCTAVO_INLINE Words spread_byte(Words x) {  // the lowest byte of a lane in all four
  alignas(16) static constexpr uint8_t kPlaces[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  return permute(x, each_16(kPlaces));
}

// Of seven signs the eighth, which makes their number even, in the highest bit; for bytes below 128.
OCTAVO_INLINE Words with_eighth_sign(Words sevens) {
  alignas(16) static constexpr uint8_t kOdd[16] = {0, 128, 128, 0, 128, 0, 0, 128, 128, 0, 0, 128, 0, 128, 128, 0};
  const Words low = permute(each_16(kOdd), low_nibbles(sevens)), high = permute(each_16(kOdd), high_nibbles(sevens));
  return either(sevens, differ(low, high));
}

// ---- points ---------------------------------------------------------------------------------------------------------

// A group in a block: for each output the low bytes of its points' numbers, four or eight, and then
//   IQ2_XXS, IQ3_XXS  a word: four times seven signs, the scale in the high four bits
//   IQ2_XS            a word: four times seven signs, the ninth bits of four points in the high four bits
//   IQ2_S, IQ3_S      a word of 32 signs, a byte of high bits
//   IQ1_S             16 bits: four times three high bits, the scale in three, what is added to all points in the last
//   IQ1_M             16 bits: four times three high bits, and what is added to the point
constexpr int kNumberBytes(Format f) { return f == Format::kIQ3_XXS || f == Format::kIQ3_S ? 8 : 4; }

template <Format F>
struct GridCodes {
  static constexpr bool kFour = kNumberBytes(F) == 8;  // coordinates of a point, else eight
  static constexpr bool kSevens = F == Format::kIQ2_XXS || F == Format::kIQ2_XS || F == Format::kIQ3_XXS;
  static constexpr bool kTernary = F == Format::kIQ1_S || F == Format::kIQ1_M;
  const uint8_t *codes, *grid;
  int column;

  OCTAVO_INLINE GridCodes(const uint8_t* block, int group, int first, const uint8_t* table)
      : codes(block + start_of_codes(planes_of(F)) + group * bytes_of_codes(planes_of(F))), grid(table), column(first) {}

  OCTAVO_INLINE Words numbers(int four) const { return load_words(codes + four * 4 * kPanel + 4 * column); }
  OCTAVO_INLINE const uint8_t* rest() const { return codes + kNumberBytes(F) * kPanel; }
  OCTAVO_INLINE Words signs() const { return load_words(rest() + 4 * column); }
  OCTAVO_INLINE Words halves() const { return load_halves(rest() + 2 * column); }
  OCTAVO_INLINE Words high_bits() const { return load_bytes(rest() + 4 * kPanel + column); }

  // Bits First .. First + Num - 1 of each lane, moved to bit To.
  template <int First, int Num, int To>
  static OCTAVO_INLINE Words bits(Words x) {
    return both(shift<To - First>(x), repeat(((1 << Num) - 1) << To));
  }

  // Where point Point begins in the grid.
  template <int Point>
  OCTAVO_INLINE Words place() const {
    constexpr int kScale = kFour ? 2 : 3;  // of a point's bytes, as a power of two
    const Words low = bits<8 * (Point % 4), 8, kScale>(numbers(Point / 4));
    if constexpr (F == Format::kIQ2_XS) return either(low, bits<28 + Point, 1, 8 + kScale>(signs()));
    if constexpr (F == Format::kIQ2_S) return either(low, bits<2 * Point, 2, 8 + kScale>(high_bits()));
    if constexpr (F == Format::kIQ3_S) return either(low, bits<Point, 1, 8 + kScale>(high_bits()));
    if constexpr (F == Format::kIQ1_S) return either(low, bits<3 * Point, 3, 8 + kScale>(halves()));
    if constexpr (F == Format::kIQ1_M) return either(low, bits<4 * Point, 3, 8 + kScale>(halves()));
    return low;
  }

  // Inputs 4 Row .. 4 Row + 3.
  template <int Row>
  OCTAVO_INLINE Words row() const {
    constexpr int kPoint = kFour ? Row : Row / 2;
    const Words point = look_up(kFour ? grid : grid + Row % 2 * 4, place<kPoint>());
    if constexpr (kTernary) {
      const Words minus = bits<F == Format::kIQ1_S ? 15 : 4 * kPoint + 3, 1, 0>(halves());
      return add(point, both(add(minus, repeat(-1)), repeat(0x02020202)));  // 0 - 1 is all bits
    } else {
      Words eight;
      if constexpr (kSevens) {
        eight = with_eighth_sign(both(spread_byte(shift<-7 * (Row / 2)>(signs())), repeat(0x7F7F7F7F)));
      } else {
        eight = spread_byte(shift<-8 * (Row / 2)>(signs()));
      }
      const Words mask = repeat(static_cast<int32_t>(Row % 2 == 0 ? 0x08040201u : 0x80402010u));
      return with_signs(point, eight, mask, repeat(64 * 0x01010101));
    }
  }

  // What d is multiplied by, for formats that have it among the codes.
  OCTAVO_INLINE vf own_scale() const {
    if constexpr (F == Format::kIQ1_S) return to_float(either(bits<12, 3, 1>(halves()), repeat(1)));
    return vadd(to_float(shift_right<28>(signs())), vset(0.5f));
  }
};

// ---- digits ---------------------------------------------------------------------------------------------------------

// TQ1_0: rows of words whose bytes have five digits of base 3 each, for five rows of a block's 64; the first digit is the
// most significant one of a fraction of 256.
struct DigitCodes {
  const uint8_t* words;
  int first_row;

  OCTAVO_INLINE DigitCodes(const uint8_t* block, int group, int column, const uint8_t*)
      : words(block + start_of_codes(planes_of(Format::kTQ1_0)) + 4 * column), first_row(group * kWordRows) {}

  template <int Row>
  OCTAVO_INLINE Words row() const {
    static constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    const int at = first_row + Row, power = kPowers[at % 5];
    const Words packed = load_words(words + at / 5 * 4 * kPanel), low = repeat(0x00FF00FF);
    const auto digit = [&](Words bytes) OCTAVO_INLINE_LAMBDA {
      return upper_bytes(times(both(times(bytes, power), low), 3));
    };
    return either(digit(both(packed, low)), shift_left<8>(digit(upper_bytes(packed))));
  }
};

}  // namespace octavo
