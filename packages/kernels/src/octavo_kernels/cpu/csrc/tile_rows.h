// Rounded rows in memory: those for the tiles of AMX by sixteens, then the others as rounded_group.h has them.
//
// With codes of 4 bits one sum of a tile's products holds two digits, the higher by the code times 16, both in a byte. An
// input of 24 bits is then two pairs of digits of 8 and 4 bits, and not three digits of 8.

#pragma once

#include "codes.h"
#include "matmul.h"
#include "rounded_groups.h"
#include "tiles.h"

namespace octavo {

#if defined(OCTAVO_HAS_TILES)

template <Format F, int N>
constexpr bool kInPairs = N == 3 && F != Format::kQ8_0;
template <Format F, int N>
constexpr int kTileDigits = kInPairs<F, N> ? 2 : N;  // sums of a group
template <Format F, int N>
constexpr int kDepth = kInPairs<F, N> ? 2 * kGroup : kGroup;  // bytes of inputs in one of them

// 32 inputs of sixteen rows.
template <Format F, int N>
struct TileGroup {
  int8_t digits[kTileDigits<F, N>][kTileRows][kDepth<F, N>];  // highest first
  float scale[kTileRows];
  float offset[kTileRows];  // the scale times the sum of the numbers
};

template <Format F, int N>
constexpr int64_t kBytesInTiles = sizeof(TileGroup<F, N>) / kTileRows;
// Whether this process may use tiles, and should. Written before the first product.
inline bool tiles_are_used = false;

// Sixteen rows at a time, and those that remain if there are so many that vectors would take longer. Such a tile is filled
// up with its last row.
inline int64_t num_in_tiles(int64_t num_rows) {
  constexpr int64_t kLeast = 11;
  const int64_t rest = num_rows % kTileRows;
  if (!tiles_are_used || num_rows < kTileRows) return 0;
  return rest >= kLeast ? num_rows : num_rows - rest;
}
#else
template <Format F, int N>
constexpr int64_t kBytesInTiles = 0;
inline int64_t num_in_tiles(int64_t) { return 0; }
#endif

// ---- rounded rows in memory: as many as can be in tiles, then the others --------------------------------------------

template <Format F, int N>
constexpr int64_t kBytesOfGroup = kBytesInTiles<F, N> > int64_t{sizeof(Group<N>)} ? kBytesInTiles<F, N> : sizeof(Group<N>);

// The groups of one of the others.
template <Format F, int N>
const Group<N>* rounded_row(const Product& product, int64_t row) {
  const int64_t num_groups = product.in_features / kGroup, in_tiles = num_in_tiles(product.num_rows);
  const char* others = static_cast<const char*>(product.rounded) + in_tiles * num_groups * kBytesInTiles<F, N>;
  return reinterpret_cast<const Group<N>*>(others) + (row - in_tiles) * num_groups;
}

#if defined(OCTAVO_HAS_TILES)

// The groups of sixteen rows, of which `row` is the first.
template <Format F, int N>
const TileGroup<F, N>* tile_rows(const Product& product, int64_t row) {
  const int64_t num_groups = product.in_features / kGroup;
  return static_cast<const TileGroup<F, N>*>(product.rounded) + row / kTileRows * num_groups;
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// Writes the low bytes of four vectors of words, which are -128 .. 127.
OCTAVO_INLINE void store_low_bytes(int8_t* to, Words a, Words b, Words c, Words d) {
  const Words quarters = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const Words order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, quarters));
}

// Writes two vectors of numbers of 12 bits as pairs of digits: those of 8 bits, then those of 4.
OCTAVO_INLINE void store_pairs(int8_t* to, Words a, Words b) {
  const Words low = repeat(15);
  store_low_bytes(to, _mm512_srai_epi32(a, 4), _mm512_srai_epi32(b, 4), _mm512_and_si512(a, low),
                  _mm512_and_si512(b, low));
}

// Rounds away 8 bits, or 12; `rest` is what is left of them.
template <int Bits>
OCTAVO_INLINE Words split_low(Words x, Words& rest) {
  const Words high = _mm512_srai_epi32(add(x, repeat(1 << (Bits - 1))), Bits);
  rest = _mm512_sub_epi32(x, shift_left<Bits>(high));
  return high;
}

// The digits of 32 numbers of two rows.
template <Format F, int N>
OCTAVO_INLINE void store_two_rows(Words (&x)[2][2], int row, TileGroup<F, N>& out) {
  if constexpr (kInPairs<F, N>) {  // 12 bits and 12 bits, each as 8 bits and then 4 bits that are 0 .. 15
    for (int i = 0; i < 2; ++i) {
      Words low[2];
      const Words high[2] = {split_low<12>(x[i][0], low[0]), split_low<12>(x[i][1], low[1])};
      store_pairs(out.digits[0][row + i], high[0], high[1]);
      store_pairs(out.digits[1][row + i], low[0], low[1]);
    }
    return;
  }
  for (int digit = N - 1; digit > 0; --digit) {
    Words low[2][2];
    for (int i = 0; i < 4; ++i) x[i / 2][i % 2] = split_low<8>(x[i / 2][i % 2], low[i / 2][i % 2]);
    store_low_bytes(out.digits[digit][row], low[0][0], low[0][1], low[1][0], low[1][1]);
  }
  store_low_bytes(out.digits[0][row], x[0][0], x[0][1], x[1][0], x[1][1]);
}

// Rounds 32 inputs of up to sixteen rows, as round_group does those of one.
template <Format F, int N>
void round_groups(const float* values, int64_t stride, int num_rows, TileGroup<F, N>& out) {
  const auto inputs = [&](int row) OCTAVO_INLINE_LAMBDA {
    return Inputs(values + (row < num_rows ? row : num_rows - 1) * stride);
  };
  Words lanes[kTileRows];
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) lanes[row] = inputs(row).larger_of_halves();
  vf scale, inverse;
  units_of_groups<N>(join_lanes(lanes, [](Words a, Words b) { return _mm512_max_epu32(a, b); }), scale, inverse);
  vstore(out.scale, scale);
  alignas(64) float inverses[kTileRows];
  vstore(inverses, inverse);
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; row += 2) {
    Words numbers[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      inputs(row + i).round(inverses[row + i], numbers[i][0], numbers[i][1]);
      lanes[row + i] = add(numbers[i][0], numbers[i][1]);
    }
    store_two_rows(numbers, row, out);
  }
  if constexpr (F == Format::kQ4_1)
    vstore(out.offset, vmul(scale, to_float(join_lanes(lanes, [](Words a, Words b) { return add(a, b); }))));
}

#endif

}  // namespace octavo
