// Products of weights whose codes lie in planes with inputs that were rounded, in groups of 32, to whole numbers of one or
// three digits: the scheme of matmul_codes.cpp, for any format that unpacks to a byte per code. A group's sums are those
// of its scales: one of 32 products, or two of 16. One row takes codes out of the planes in registers; more rows
// share codes that were unpacked into L1. Both do the same operations in the same order.

#include "plane_sums.h"
#include "rounding.h"

namespace octavo {
namespace {

constexpr int kColumns = 2 * W;  // outputs that are multiplied at once
template <int N>
constexpr int kMaxTileRows = W == 16 && N == 1 ? 6 : (W == 4 ? 2 : 3);
constexpr int kChunkGroups = 16;         // unpacked at once: 28 KiB
constexpr int64_t kBytesAhead = 3072;    // how far ahead of its use memory is asked for
constexpr bool kTakesRegisters = W > 4;  // otherwise one row is unpacked as several are

// ---- one row: codes out of the planes -------------------------------------------------------------------------------

template <Format F>
struct CodesOfPlanes {
  CodesOf<F> first, second;

  OCTAVO_INLINE CodesOfPlanes(const uint8_t* block, int group, int column, const uint8_t* grid)
      : first(block, group, column, grid), second(block, group, column + W, grid) {}
  template <Part16 Part, class Use>
  OCTAVO_INLINE void each_row(Use&& use) const {
    if constexpr (Part != kSecondHalf) {
      use(0, first.template row<0>(), second.template row<0>());
      use(1, first.template row<1>(), second.template row<1>());
      use(2, first.template row<2>(), second.template row<2>());
      use(3, first.template row<3>(), second.template row<3>());
    }
    if constexpr (Part != kFirstHalf) {
      use(4, first.template row<4>(), second.template row<4>());
      use(5, first.template row<5>(), second.template row<5>());
      use(6, first.template row<6>(), second.template row<6>());
      use(7, first.template row<7>(), second.template row<7>());
    }
  }
};

// The m that is left when the centre is taken off the codes.
OCTAVO_INLINE vf centred_m(const PlaneScale& scale, int centre) {
  return centre == 0 ? scale.m : vfma(scale.d, vset(static_cast<float>(centre)), scale.m);
}

template <Format F>
OCTAVO_INLINE PlaneScales load_scales(const uint8_t* block, int group, int half, int column) {
  PlaneScales scales{{}, {}, planes_of(F).centre, planes_of(F).minimum};
  for (int i = 0; i < 2; ++i) {
    const PlaneScale scale = plane_scale<F>(block, group, half, column + i * W);
    scales.d[i] = scale.d;
    scales.m[i] = centred_m(scale, scales.centre);
  }
  return scales;
}

template <Format F>
OCTAVO_INLINE PairScales load_pair(const uint8_t* block, int group, int column) {
  constexpr Planes kPlanes = planes_of(F);
  const auto* units = reinterpret_cast<const uint16_t*>(block) + column;
  const uint8_t* numbers = block + start_of_scales(kPlanes) + 2 * group * kPanel + column;
  PairScales scales{{}, {}, {}, {}, kPlanes.centre, kPlanes.minimum};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    scales.d[i] = vload_f16(units + i * W);
    if constexpr (kPlanes.minimum) scales.m[i] = vload_f16(units + kPanel + i * W);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8_t* at = numbers + half * kPanel + i * W;
      if constexpr (kPlanes.minimum) {
        scales.number[half][i] = vload_nibbles(at, false);
        scales.minimum[half][i] = vload_nibbles(at, true);
      } else {
        scales.number[half][i] = vload_i8(reinterpret_cast<const int8_t*>(at));
      }
    }
  }
  return scales;
}

template <Format F, int N>
void one_row(const Product& product, const Part& part) {
  constexpr Planes kPlanes = planes_of(F);
  constexpr bool kWide = is_wide(kPlanes);
  const GroupsOfRows<N, 1> rows(product, part.first_row);
  const int64_t num_groups = product.in_features / kGroup;
  const uint8_t* block = product.weight + part.first_panel * bytes_of_panel(kPlanes, product.in_features);
  for (int64_t panel = 0; panel < part.num_panels; ++panel, block += bytes_of_panel(kPlanes, product.in_features))
    for (int column = 0; column < kPanel; column += kColumns) {
      vf sums[1][2] = {{vzero(), vzero()}};
      for (int64_t first = 0; first < num_groups; first += kPlanes.groups_of_block) {
        const uint8_t* at = block + first / kPlanes.groups_of_block * bytes_of_block(kPlanes);
        if (column == 0) prefetch(at + kBytesAhead, start_of_codes(kPlanes));
        for (int group = 0; group < kPlanes.groups_of_block; ++group) {
          if (column == 0)
            prefetch(at + kBytesAhead + start_of_codes(kPlanes) + group * bytes_of_codes(kPlanes), bytes_of_codes(kPlanes));
          const CodesOfPlanes<F> codes(at, group, column, product.grid);
          if constexpr (kIsPair<F, N>) {
            add_pair<N, 1>(codes, load_pair<F>(at, group, column), rows.of, first + group, sums);
            continue;
          }
          const PlaneScales scales = load_scales<F>(at, group, 0, column);
          if constexpr (kPlanes.scales_of_group == 2) {
            const PlaneScales second = load_scales<F>(at, group, 1, column);
            add_part<N, 1, kWide, kFirstHalf>(codes, scales, rows.of, first + group, sums);
            add_part<N, 1, kWide, kSecondHalf>(codes, second, rows.of, first + group, sums);
          } else {
            add_part<N, 1, kWide, kWhole>(codes, scales, rows.of, first + group, sums);
          }
        }
      }
      float* out = part.out + panel * kPanel + column;
      vstore(out, sums[0][0]);
      vstore(out + W, sums[0][1]);
    }
}

template <int N>
using OneRowFunction = void (*)(const Product&, const Part&);
template <int N>
OneRowFunction<N> one_row_of(Format format) {
  if constexpr (kTakesRegisters) switch (format) {
      case Format::kQ5_0: return &one_row<Format::kQ5_0, N>;
      case Format::kQ5_1: return &one_row<Format::kQ5_1, N>;
      case Format::kQ2_K: return &one_row<Format::kQ2_K, N>;
      case Format::kQ3_K: return &one_row<Format::kQ3_K, N>;
      case Format::kQ4_K: return &one_row<Format::kQ4_K, N>;
      case Format::kQ5_K: return &one_row<Format::kQ5_K, N>;
      case Format::kQ6_K: return &one_row<Format::kQ6_K, N>;
      case Format::kIQ4_NL: return &one_row<Format::kIQ4_NL, N>;
      case Format::kIQ4_XS: return &one_row<Format::kIQ4_XS, N>;
      case Format::kMXFP4: return &one_row<Format::kMXFP4, N>;
      case Format::kNVFP4: return &one_row<Format::kNVFP4, N>;
      case Format::kQ8_K: return &one_row<Format::kQ8_K, N>;
      case Format::kTQ2_0: return &one_row<Format::kTQ2_0, N>;
      case Format::kTQ1_0: return &one_row<Format::kTQ1_0, N>;
      case Format::kIQ2_XXS: return &one_row<Format::kIQ2_XXS, N>;
      case Format::kIQ2_XS: return &one_row<Format::kIQ2_XS, N>;
      case Format::kIQ2_S: return &one_row<Format::kIQ2_S, N>;
      case Format::kIQ3_XXS: return &one_row<Format::kIQ3_XXS, N>;
      case Format::kIQ3_S: return &one_row<Format::kIQ3_S, N>;
      case Format::kIQ1_S: return &one_row<Format::kIQ1_S, N>;
      case Format::kIQ1_M: return &one_row<Format::kIQ1_M, N>;
      default: break;
    }
  return nullptr;
}

// ---- more rows: groups unpacked into L1 -----------------------------------------------------------------------------

struct UnpackedCodes {
  const uint8_t* words;

  template <Part16 Part, class Use>
  OCTAVO_INLINE void each_row(Use&& use) const {
#pragma GCC unroll 8
    for (int row = Part == kSecondHalf ? 4 : 0; row < (Part == kFirstHalf ? 4 : 8); ++row)
      use(row, load_words(words + row * 4 * kPanel), load_words(words + row * 4 * kPanel + 4 * W));
  }
};

// R rows times some unpacked groups; m is what the centre leaves. `next` as in matmul_codes.cpp.
template <int N, int R, bool Wide, bool Halves, bool Pair>
void tile(const Product& product, const UnpackedGroup* groups, int64_t first_group, int64_t num_groups, int64_t first_row,
          float* out, int64_t out_stride, const uint8_t* next, int64_t next_bytes) {
  const GroupsOfRows<N, R> rows(product, first_row);
  const Planes& planes = product.planes->planes;
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* at = out + r * out_stride + column;
      sums[r][0] = first_group == 0 ? vzero() : vload(at);
      sums[r][1] = first_group == 0 ? vzero() : vload(at + W);
    }
    for (int64_t g = 0; g < num_groups; ++g) {
      prefetch(next + g * next_bytes, next_bytes);
      const UnpackedGroup& group = groups[g];
      const UnpackedCodes codes{group.codes + 4 * column};
      const auto scales = [&](int half) OCTAVO_INLINE_LAMBDA {
        const float *d = group.d[half] + column, *m = group.m[half] + column;
        return PlaneScales{{vload(d), vload(d + W)}, {vload(m), vload(m + W)}, planes.centre, planes.minimum};
      };
      if constexpr (Pair) {
        PairScales pair{{}, {}, {}, {}, planes.centre, planes.minimum};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int at = column + i * W;
          pair.d[i] = vload(group.units[0] + at), pair.m[i] = vload(group.units[1] + at);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            pair.number[half][i] = vload(group.d[half] + at), pair.minimum[half][i] = vload(group.m[half] + at);
        }
        add_pair<N, R>(codes, pair, rows.of, first_group + g, sums);
      } else if constexpr (Halves) {
        add_part<N, R, Wide, kFirstHalf>(codes, scales(0), rows.of, first_group + g, sums);
        add_part<N, R, Wide, kSecondHalf>(codes, scales(1), rows.of, first_group + g, sums);
      } else {
        add_part<N, R, Wide, kWhole>(codes, scales(0), rows.of, first_group + g, sums);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* at = out + r * out_stride + column;
      vstore(at, sums[r][0]);
      vstore(at + W, sums[r][1]);
    }
  }
}

using TileFunction = void (*)(const Product&, const UnpackedGroup*, int64_t, int64_t, int64_t, float*, int64_t,
                              const uint8_t*, int64_t);
template <int N, int R, bool Wide, bool Halves, bool Pair>
constexpr TileFunction tile_of() {
  if constexpr (R <= kMaxTileRows<N>) return &tile<N, R, Wide, Halves, Pair>;
  return nullptr;
}

template <Format F>
void store_pair(const uint8_t* block, int group, int column, UnpackedGroup& out) {
  const PairScales scales = load_pair<F>(block, group, column);
  for (int i = 0; i < 2; ++i) {
    const int at = column + i * W;
    vstore(out.units[0] + at, scales.d[i]);
    vstore(out.units[1] + at, scales.m[i]);
    for (int half = 0; half < 2; ++half) {
      vstore(out.d[half] + at, scales.number[half][i]);
      vstore(out.m[half] + at, scales.minimum[half][i]);
    }
  }
}

template <bool Pair>
void unpack_for_products(const Product& product, const uint8_t* panel, int64_t first, int64_t num_groups,
                         UnpackedGroup* groups) {
  const PlaneFormat& format = *product.planes;
  const Planes& planes = format.planes;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t index = first + g;
    const uint8_t* block = panel + index / planes.groups_of_block * bytes_of_block(planes);
    const auto place = static_cast<int>(index % planes.groups_of_block);
    format.unpack(block, place, product.grid, groups[g]);
    if constexpr (Pair) {
      const auto store = format.format == Format::kQ2_K ? &store_pair<Format::kQ2_K> : &store_pair<Format::kQ3_K>;
      for (int column = 0; column < kPanel; column += 2 * W) store(block, place, column, groups[g]);
      continue;
    }
    for (int half = 0; half < (planes.scales_of_group == 2 ? 2 : 1); ++half)
      for (int column = 0; column < kPanel; column += W) {
        float* m = groups[g].m[half] + column;
        vstore(m, centred_m({vload(groups[g].d[half] + column), vload(m)}, planes.centre));
      }
  }
}

template <int N, bool Wide, bool Halves, bool Pair>
void many_rows(const Product& product, const Part& part, UnpackedGroup* groups) {
  static constexpr TileFunction kTiles[] = {nullptr,
                                            tile_of<N, 1, Wide, Halves, Pair>(),
                                            tile_of<N, 2, Wide, Halves, Pair>(),
                                            tile_of<N, 3, Wide, Halves, Pair>(),
                                            tile_of<N, 4, Wide, Halves, Pair>(),
                                            tile_of<N, 5, Wide, Halves, Pair>(),
                                            tile_of<N, 6, Wide, Halves, Pair>()};
  const Planes& planes = product.planes->planes;
  const int64_t num_tiles = (part.num_rows + kMaxTileRows<N> - 1) / kMaxTileRows<N>;
  const int64_t num_groups = product.in_features / kGroup;
  const int64_t num_chunks = (num_groups + kChunkGroups - 1) / kChunkGroups;
  const int64_t panel_bytes = bytes_of_panel(planes, product.in_features);
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * panel_bytes;
    for (int64_t c = 0; c < num_chunks; ++c) {  // chunks of nearly equal length
      const int64_t first = num_groups * c / num_chunks, count = num_groups * (c + 1) / num_chunks - first;
      unpack_for_products<Pair>(product, weights, first, count, groups);
      const uint8_t* next = weights + panel_bytes * (first + count) / num_groups;
      const int64_t next_bytes = (panel_bytes / num_groups / num_tiles + 63) / 64 * 64;
      for (int64_t t = 0; t < num_tiles; ++t) {  // tiles of nearly equal height
        const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
        float* out = part.out + row * part.out_stride + panel * kPanel;
        kTiles[stop - row](product, groups, first, count, part.first_row + row, out, part.out_stride,
                           next + t * count * next_bytes, next_bytes);
      }
    }
  }
}

template <int N>
void rounded(const Product& product, const Part& part, void* scratch) {
  static_assert(kChunkGroups * sizeof(UnpackedGroup) <= kScratchBytes);
  if (part.num_rows == 1 && kTakesRegisters) return one_row_of<N>(product.planes->format)(product, part);
  const Planes& planes = product.planes->planes;
  auto* groups = static_cast<UnpackedGroup*>(scratch);
  if constexpr (N == 3)
    if (product.planes->format == Format::kQ2_K || product.planes->format == Format::kQ3_K)
      return many_rows<N, false, true, true>(product, part, groups);
  if (planes.scales_of_group == 2) return many_rows<N, kUnsignedBytes, true, false>(product, part, groups);
  if constexpr (!kUnsignedBytes)
    if (!is_wide(planes)) return many_rows<N, false, false, false>(product, part, groups);
  return many_rows<N, true, false, false>(product, part, groups);  // where any byte is multiplied as it is, all may be wide
}

// ---- rounding -------------------------------------------------------------------------------------------------------

OCTAVO_INLINE int32_t sum_of_half(const int8_t* digits) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(digits));
  const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());  // 128 more each
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 128 * kGroup / 2;
#else
  int32_t sum = 0;
  for (int i = 0; i < kGroup / 2; ++i) sum += digits[i];
  return sum;
#endif
}

template <int N>
void round_group(const float* values, PlaneGroup<N>& group) {
  const Inputs inputs(values);
  const float largest = inputs.largest();
  if (largest < INFINITY) {
    const Unit unit = unit_of<N>(largest);
    int32_t sum = 0, sum_low = 0;
    group.scale = unit.scale;
    inputs.round(unit.inverse, group.digits, sum, sum_low);
  } else {  // what is not a number has no digits; the scale makes every output of the row NaN
    group.scale = NAN;
    std::memset(group.digits, 0, sizeof group.digits);
  }
  for (int half = 0; half < 2; ++half) {
    const int start = half * kGroup / 2;
    group.low[half] = sum_of_half(group.digits[N - 1] + start);
    group.high[half] = 0;
    if constexpr (N == 3)
      group.high[half] = 256 * sum_of_half(group.digits[0] + start) + sum_of_half(group.digits[1] + start);
    group.offset[half] = group.scale * static_cast<float>(256 * group.high[half] + group.low[half]);
  }
  group.offset[kWhole] =
      group.scale * static_cast<float>(256 * (group.high[0] + group.high[1]) + group.low[0] + group.low[1]);
}

template <int N>
void round_rows(const float* x, int64_t x_stride, int64_t in_features, int64_t first_row, int64_t num_rows, void* out) {
  const int64_t num_groups = in_features / kGroup;
  PlaneGroup<N>* groups = static_cast<PlaneGroup<N>*>(out) + first_row * num_groups;
  for (int64_t row = first_row; row < first_row + num_rows; ++row)
    for (int64_t g = 0; g < num_groups; ++g) round_group(x + row * x_stride + g * kGroup, *groups++);
}

template <int N>
constexpr Method method_of() {
  static_assert(sizeof(PlaneGroup<N>) <= 128, "the workspace has no more");
  return {&rounded<N>, &round_rows<N>, sizeof(PlaneGroup<N>)};
}

}  // namespace

Method planes_method(bool int8_activations) {
  if (int8_activations) return method_of<1>();
#if defined(__AVX512VNNI__)
  return method_of<3>();
#else
  return planes_fma_method();
#endif
}

}  // namespace octavo
