// Products of rows by sixteens in the tiles of AMX: the same sums of groups as few rows have, as integers, and so the same
// bits.
//
// Tiles multiply bytes sixteen times as fast as vectors do, but sums have to pass through memory to be scaled, and each
// takes longer to get there than to be made. So a group leaves as few as it can, and everything else is done meanwhile.

#pragma once

#include <algorithm>
#include <type_traits>

#include "tile_rows.h"

namespace octavo {

#if defined(OCTAVO_HAS_TILES)

// ---- weights --------------------------------------------------------------------------------------------------------

// Some groups of a panel: their codes as signed bytes, W outputs at a time, and their scales. And a thread's sums.
template <Format F, int N>
struct TileChunk {
  static constexpr int kMaxGroups = 640 / kDepth<F, N>;  // codes of 20 KiB

  uint8_t codes[kMaxGroups][kPanel / W][kDepth<F, N> / 4][kTileRowBytes];
  float d[kMaxGroups][kPanel];
  float m[kMaxGroups][kPanel];
  int32_t sums[2][kTileDigits<F, N>][kTileRows][W];
};

template <Format F, int N>
void unpack(const uint8_t* groups, int64_t num_groups, TileChunk<F, N>& chunk) {
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

// What is done to sixteen rows times W outputs, group by group. A tile's products take so long that stores which wait for
// them would keep everything behind them from starting. So three groups are under way at once: one is multiplied, the
// sums of the one before are stored, and those of the one before that are scaled, a few rows between two instructions for
// tiles.
template <Format F, int N>
class Stream {
 public:
  Stream(const TileGroup<F, N>* x, TileChunk<F, N>& chunk, int half) : x_(x), chunk_(chunk), half_(half) {}

  // Of num_rows rows, from zeros on if `out` is null.
  OCTAVO_INLINE void load_outputs(const float* out, int64_t stride, int num_rows) {
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row)
      outputs_[row] = out == nullptr || row >= num_rows ? vzero() : vload(out + row * stride);
  }
  OCTAVO_INLINE void store_outputs(float* out, int64_t stride, int num_rows) const {
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row)
      if (row < num_rows) vstore(out + row * stride, outputs_[row]);
  }

  // Multiplies group g, which is even or odd as Parity is 0 or 1.
  template <int Parity>
  OCTAVO_INLINE void multiply(int64_t g) {
    events<Parity, 0, kStored>(g, [](auto) {});
  }
  // Stores the sums of group g.
  template <int Parity>
  OCTAVO_INLINE void store(int64_t g) {
    events<1 - Parity, kStored, kEvents>(g + 1, [](auto) {});
  }
  // Scales the sums of group g and adds them to the outputs.
  OCTAVO_INLINE void scale(int64_t g) { scale_rows<0, kTileRows>(g); }

  // All three, of group g, g - 1 and g - 2.
  template <int Parity>
  OCTAVO_INLINE void step(int64_t g) {
    events<Parity, 0, kEvents>(g, [&](auto event) OCTAVO_INLINE_LAMBDA {
      scale_rows<kTileRows * event / kEvents, kTileRows * (event + 1) / kEvents>(g - 2);
    });
  }

 private:
  // Weights are loaded, then digits of inputs loaded and multiplied, then sums of the group before stored.
  static constexpr int kDigits = kTileDigits<F, N>, kStored = 1 + 2 * kDigits, kEvents = kStored + kDigits;

  template <int Parity, int First, int Stop, class Between>
  OCTAVO_INLINE void events(int64_t g, Between between) {
    if constexpr (First < Stop) {
      if constexpr (First == 0) {
        load_tile<7>(chunk_.codes[g][half_], kTileRowBytes);
      } else if constexpr (First >= kStored) {
        constexpr int digit = First - kStored;
        store_tile<(1 - Parity) * kDigits + digit>(chunk_.sums[1 - Parity][digit][0]);
      } else if constexpr (First % 2 == 1) {
        load_tile<6>(x_[g].digits[First / 2], kDepth<F, N>);
      } else {
        multiply_tiles<Parity * kDigits + First / 2 - 1, 6, 7>();
      }
      between(std::integral_constant<int, First>{});
      events<Parity, First + 1, Stop>(g, between);
    }
  }

  template <int First, int Stop>
  OCTAVO_INLINE void scale_rows(int64_t g) {
    const vf d = vload(chunk_.d[g] + half_ * W), m = F == Format::kQ4_1 ? vload(chunk_.m[g] + half_ * W) : d;
#pragma GCC unroll 16
    for (int row = First; row < Stop; ++row)
      outputs_[row] = add_scaled(chunk_.sums[g % 2], x_[g], row, d, m, outputs_[row]);
  }

  // By the operations of few rows.
  static OCTAVO_INLINE vf add_scaled(const int32_t (&sums)[kTileDigits<F, N>][kTileRows][W],
                                     const TileGroup<F, N>& x, int row, vf d, vf m, vf out) {
    const auto sum = [&](int i) OCTAVO_INLINE_LAMBDA { return _mm512_load_si512(sums[i][row]); };
    const vf scale = vset(x.scale[row]);
    if constexpr (F == Format::kQ4_1) out = vfma(vset(x.offset[row]), m, out);
    if constexpr (kInPairs<F, N>) return vfma(vmul(to_float(add(shift_left<12>(sum(0)), sum(1))), scale), d, out);
    if constexpr (N == 1) return vfma(vmul(to_float(sum(0)), scale), d, out);
    const Words high = add(shift_left<8>(sum(0)), sum(1));
    out = vfma(vmul(to_float(high), vset(x.scale[row] * 256.0f)), d, out);
    return vfma(vmul(to_float(sum(2)), scale), d, out);
  }

  const TileGroup<F, N>* x_;
  TileChunk<F, N>& chunk_;
  int half_;
  vf outputs_[kTileRows];
};

// Up to sixteen rows times W outputs of a chunk. A `begin` of null stands for zeros. With every group, next_bytes of what
// will be needed afterwards are asked for, from `next` on, and a row that will be written.
template <Format F, int N>
void tile(const TileGroup<F, N>* x, int num_rows, TileChunk<F, N>& chunk, int64_t num_groups, int half,
          const float* begin, float* out, int64_t out_stride, const uint8_t* next, int64_t next_bytes) {
  Stream<F, N> stream(x, chunk, half);
  stream.load_outputs(begin, out_stride, num_rows);
  const auto look_ahead = [&](int64_t g) OCTAVO_INLINE_LAMBDA {
    prefetch_lines(next, g * next_bytes, (g + 1) * next_bytes);
    if (g < num_rows) __builtin_prefetch(out + g * out_stride, 1);
  };
  for (int64_t g = 0; g < std::min<int64_t>(num_groups, 2); ++g) look_ahead(g);
  stream.template multiply<0>(0);
  if (num_groups > 1) stream.template multiply<1>(1);
  stream.template store<0>(0);
  for (int64_t g = 2; g < num_groups; ++g) {
    look_ahead(g);
    if (g % 2 == 0) {
      stream.template step<0>(g);
    } else {
      stream.template step<1>(g);
    }
  }
  if (num_groups > 1) {
    stream.scale(num_groups - 2);
    num_groups % 2 == 0 ? stream.template store<1>(num_groups - 1) : stream.template store<0>(num_groups - 1);
  }
  stream.scale(num_groups - 1);
  stream.store_outputs(out, out_stride, num_rows);
}

// The rows of the part are in tiles, from the first of one on.
template <Format F, int N>
void multiply_in_tiles(const Product& product, const Part& part, TileChunk<F, N>& chunk) {
  const TileShapes shapes(kDepth<F, N>);
  const TileGroup<F, N>* x = tile_rows<F, N>(product, part.first_row);
  const int64_t num_blocks = (part.num_rows + kTileRows - 1) / kTileRows, num_groups = product.in_features / kGroup;
  const int64_t num_chunks = (num_groups + chunk.kMaxGroups - 1) / chunk.kMaxGroups;
  const int64_t next_bytes = (bytes_of_group(F) + 2 * num_blocks - 1) / (2 * num_blocks);  // a tile's, for each group
  const int64_t panel_bytes = bytes_of_panel(F, product.in_features);
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * panel_bytes;
    const bool last = panel + 1 == part.num_panels;
    const uint8_t* following = last ? product.weight + part.next_panel * panel_bytes : weights + panel_bytes;
    for (int64_t c = 0; c < num_chunks; ++c) {  // chunks of nearly equal length
      const int64_t first = num_groups * c / num_chunks, count = num_groups * (c + 1) / num_chunks - first;
      unpack<F, N>(weights + first * bytes_of_group(F), count, chunk);
      const uint8_t* next = c + 1 < num_chunks ? weights + (first + count) * bytes_of_group(F) : following;
      for (int64_t block = 0; block < num_blocks; ++block)
        for (int half = 0; half < 2; ++half) {
          float* out = part.out + block * kTileRows * part.out_stride + panel * kPanel + half * W;
          const int num_rows = static_cast<int>(std::min<int64_t>(part.num_rows - block * kTileRows, kTileRows));
          tile<F, N>(x + block * num_groups + first, num_rows, chunk, count, half, first == 0 ? nullptr : out, out,
                     part.out_stride, next + (2 * block + half) * count * next_bytes, next_bytes);
        }
    }
  }
}

#endif

}  // namespace octavo
