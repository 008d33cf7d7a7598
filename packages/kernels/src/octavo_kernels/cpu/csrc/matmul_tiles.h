// Products of rows by sixteens in the tiles of AMX: the same sums of groups as rounded_group.h has, as integers, and so
// the same bits as those of few rows.
//
// Tiles multiply bytes sixteen times as fast as vectors do, but sums have to pass through memory to be scaled, and each
// takes longer to get there than to be made. So a group should leave as few as it can: with codes of 4 bits one sum
// holds two digits, the higher by the code times 16, both in a byte. An input of 24 bits is then two pairs of digits of
// 8 and 4 bits, and not three digits of 8.

#pragma once

#include "codes.h"
#include "matmul.h"
#include "rounded_group.h"
#include "tiles.h"

namespace octavo {

#if defined(__AMX_INT8__)

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
inline int64_t num_in_tiles(int64_t num_rows) { return num_rows / kTileRows * kTileRows; }
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

#if defined(__AMX_INT8__)

// The groups of sixteen rows, one of which is `row`.
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

// 32 numbers of 12 bits as digits of 8 bits, then digits of 4 bits, 0 .. 15.
OCTAVO_INLINE void store_pairs(int8_t* to, Words a, Words b) {
  const Words low = repeat(15);
  store_low_bytes(to, _mm512_srai_epi32(a, 4), _mm512_srai_epi32(b, 4), _mm512_and_si512(a, low),
                  _mm512_and_si512(b, low));
}

template <Format F, int N>
OCTAVO_INLINE void round_group(const float* values, int row, TileGroup<F, N>& out) {
  const Inputs inputs(values);
  const Unit unit = unit_of_group<N>(inputs.largest());
  Words a, b;
  inputs.round(unit.inverse, a, b);
  out.scale[row] = unit.scale;
  if constexpr (F == Format::kQ4_1)
    out.offset[row] = unit.scale * static_cast<float>(_mm512_reduce_add_epi32(add(a, b)));
  if constexpr (kInPairs<F, N>) {
    const Words high_a = _mm512_srai_epi32(add(a, repeat(1 << 11)), 12);
    const Words high_b = _mm512_srai_epi32(add(b, repeat(1 << 11)), 12);
    store_pairs(out.digits[0][row], high_a, high_b);
    store_pairs(out.digits[1][row], _mm512_sub_epi32(a, shift_left<12>(high_a)),
                _mm512_sub_epi32(b, shift_left<12>(high_b)));
  } else {
    for (int digit = N - 1; digit >= 0; --digit) {
      auto* to = reinterpret_cast<__m128i*>(out.digits[digit][row]);
      _mm_storeu_si128(to, _mm512_cvtepi32_epi8(a));
      _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(b));
      a = without_lowest_digit(a);
      b = without_lowest_digit(b);
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

constexpr int kTileChunkGroups = 10;  // the most groups whose codes are unpacked at once: 20 KiB

// Some groups of a panel: their codes as signed bytes, W outputs at a time, and their scales. And a thread's sums.
struct TileChunk {
  uint8_t codes[kTileChunkGroups][kPanel / W][2 * kWordRows][kTileRowBytes];
  float d[kTileChunkGroups][kPanel];
  float m[kTileChunkGroups][kPanel];
  int32_t sums[2][3][kTileRows][W];
};

template <Format F, int N>
void unpack(const uint8_t* groups, int64_t num_groups, TileChunk& chunk) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* group = groups + g * bytes_of_group(F);
    const auto* d = reinterpret_cast<const uint16_t*>(group);
    for (int column = 0; column < kPanel; column += W) {
      const vf scale = vload_f16(d + column);
      vstore(chunk.d[g] + column, scale);
      if constexpr (F == Format::kQ4_1) vstore(chunk.m[g] + column, load_m(d + kPanel + column, scale));
    }
    const Words middle = _mm512_set1_epi8(F == Format::kQ8_0 ? -128 : 8);
    PackedCodes<F>(group + bytes_of_scales(F), 0).each_row([&](int row, Words first, Words second) {
      const Words both[2] = {first, second};
      for (int i = 0; i < 2; ++i) {
        const Words codes = _mm512_sub_epi8(both[i], middle);
        store_words(chunk.codes[g][i][kInPairs<F, N> ? kWordRows + row : row], codes);
        if constexpr (kInPairs<F, N>)
          store_words(chunk.codes[g][i][row], shift_left<4>(_mm512_and_si512(codes, _mm512_set1_epi8(15))));
      }
    });
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// sums [digits][16 rows][W] = a group of inputs times W outputs.
template <Format F, int N>
OCTAVO_INLINE void multiply_group(const TileGroup<F, N>& x, const uint8_t (&codes)[2 * kWordRows][kTileRowBytes],
                                  int32_t (&sums)[3][kTileRows][W]) {
  load_tile<6>(codes, kTileRowBytes);
  load_tile<4>(x.digits[0], kDepth<F, N>);
  multiply_tiles<0, 4, 6>();
  if constexpr (kTileDigits<F, N> > 1) {
    load_tile<5>(x.digits[1], kDepth<F, N>);
    multiply_tiles<1, 5, 6>();
  }
  store_tile<0>(sums[0][0]);
  if constexpr (kTileDigits<F, N> > 1) store_tile<1>(sums[1][0]);
  if constexpr (kTileDigits<F, N> > 2) {
    load_tile<4>(x.digits[2], kDepth<F, N>);
    multiply_tiles<2, 4, 6>();
    store_tile<2>(sums[2][0]);
  }
}

// Adds a group to a row of outputs, by the operations of few rows.
template <Format F, int N>
OCTAVO_INLINE vf add_scaled(const int32_t (&sums)[3][kTileRows][W], int row, const TileGroup<F, N>& x, vf d, vf m, vf out) {
  const auto sum = [&](int i) OCTAVO_INLINE_LAMBDA { return _mm512_load_si512(sums[i][row]); };
  const vf scale = vset(x.scale[row]);
  if constexpr (F == Format::kQ4_1) out = vfma(vset(x.offset[row]), m, out);
  if constexpr (kInPairs<F, N>) return vfma(vmul(to_float(add(shift_left<12>(sum(0)), sum(1))), scale), d, out);
  if constexpr (N == 1) return vfma(vmul(to_float(sum(0)), scale), d, out);
  const Words high = add(shift_left<8>(sum(0)), sum(1));
  out = vfma(vmul(to_float(high), vset(x.scale[row] * 256.0f)), d, out);
  return vfma(vmul(to_float(sum(2)), scale), d, out);
}

// Sixteen rows times W outputs of a chunk: while tiles make the sums of a group, vectors scale those of the one before.
template <Format F, int N>
void tile(const TileGroup<F, N>* x, TileChunk& chunk, int64_t num_groups, int half, bool begins, float* out,
          int64_t out_stride, const uint8_t* next, int64_t next_bytes) {
  vf outputs[kTileRows];
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) outputs[row] = begins ? vzero() : vload(out + row * out_stride);
  multiply_group(x[0], chunk.codes[0][half], chunk.sums[0]);
  for (int64_t g = 0; g < num_groups; ++g) {
    prefetch(next + g * next_bytes, next_bytes);
    if (g + 1 < num_groups) multiply_group(x[g + 1], chunk.codes[g + 1][half], chunk.sums[(g + 1) % 2]);
    const vf d = vload(chunk.d[g] + half * W), m = F == Format::kQ4_1 ? vload(chunk.m[g] + half * W) : d;
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row)
      outputs[row] = add_scaled<F, N>(chunk.sums[g % 2], row, x[g], d, m, outputs[row]);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) vstore(out + row * out_stride, outputs[row]);
}

// The rows of the part are in tiles, from the first of a tile to the last of another.
template <Format F, int N>
void multiply_in_tiles(const Product& product, const Part& part, TileChunk& chunk) {
  const TileShapes shapes(kDepth<F, N>);
  const TileGroup<F, N>* x = tile_rows<F, N>(product, part.first_row);
  const int64_t num_blocks = part.num_rows / kTileRows, num_groups = product.in_features / kGroup;
  const int64_t num_chunks = (num_groups + kTileChunkGroups - 1) / kTileChunkGroups;
  const int64_t next_bytes = (bytes_of_group(F) / (2 * num_blocks) + 63) / 64 * 64;
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * bytes_of_panel(F, product.in_features);
    for (int64_t c = 0; c < num_chunks; ++c) {  // chunks of nearly equal length
      const int64_t first = num_groups * c / num_chunks, count = num_groups * (c + 1) / num_chunks - first;
      unpack<F, N>(weights + first * bytes_of_group(F), count, chunk);
      const uint8_t* next = weights + (first + count) * bytes_of_group(F);
      for (int64_t block = 0; block < num_blocks; ++block)
        for (int half = 0; half < 2; ++half)
          tile<F, N>(x + block * num_groups + first, chunk, count, half, first == 0,
                     part.out + block * kTileRows * part.out_stride + panel * kPanel + half * W, part.out_stride,
                     next + (2 * block + half) * count * next_bytes, next_bytes);
    }
  }
}

#endif

}  // namespace octavo
