// Products of weights in block formats with inputs that were rounded, in groups of 32, to whole numbers of one or three
// digits, a digit being a signed byte. Within a group codes and numbers are multiplied and summed as integers, exactly; the
// groups' sums are scaled and added in fp32 in their order. So an output does not depend on how many rows there are, nor
// on how an instruction set multiplies bytes.
//
// Three digits are about as exact as fp32: a group's scale is a power of two, at most 2**-22 of its largest magnitude, so that an
// input is off by at most half of that, and a group's sum has no error of its own, where a chain of fp32 additions rounds
// at every input. They take three multiplications of bytes where a chain takes four of floats, and nothing is decoded.

#include <algorithm>

#include "codes.h"
#include "matmul.h"
#include "matmul_tiles.h"
#include "rounded_groups.h"

namespace octavo {
namespace {

constexpr int kColumns = 2 * W;  // outputs that are multiplied at once
template <int N>
constexpr int kMaxTileRows = W == 16 && N == 1 ? 6 : 3;

// Up to so many rows every tile reads codes from the panel, which stays in L1, and takes them apart again. AMD's processors do
// that beside products of bytes, which take but two of their four pipes; others have the same ports for both.
template <int N>
int64_t max_few_rows() {
#if defined(__AVX512VNNI__)
  static const bool beside_products = __builtin_cpu_is("amd");
  if (N == 1 && beside_products) return 64;
#endif
  return 12;
}

constexpr int64_t kBytesAhead = 8192;  // how far ahead of its use memory is asked for

// ---- a group of inputs times 2W outputs -----------------------------------------------------------------------------

// A chain of digits is summed in one integer, each digit moving those before it up: all of them for 4-bit codes. 8-bit
// codes leave room for two digits; the third is a chain of its own.
template <Format F>
constexpr bool begins_chain(int digit) {
  return digit == 0 || (F == Format::kQ8_0 && digit == 2);
}
template <Format F, int N>
constexpr bool ends_chain(int digit) {
  return digit == N - 1 || (F == Format::kQ8_0 && N == 3 && digit == 1);
}

// What takes back, in the chain that ends with a digit, that codes are too large.
template <Format F, int N>
OCTAVO_INLINE Words correction(const Group<N>& x, int digit) {
  if constexpr (kSumsAreFloats<N>) return repeat(x.begin[F == Format::kQ8_0]);
  if constexpr (!kCodesAreMoved<F>) return repeat(0);
  if constexpr (F != Format::kQ8_0) return repeat(x.moved);
  return shift_left<4>(repeat(N == 1 ? x.moved : digit == 1 ? x.moved_high : x.moved_low));
}

// The sum of a group's products as a float, times the scale.
template <int N>
OCTAVO_INLINE vf scaled(Words sum, const Group<N>& x, bool last) {
#if defined(__AVX512VNNI__)
  if constexpr (kSumsAreFloats<N>) return vfma(_mm512_castsi512_ps(sum), vset(x.scale), vset(x.base));
#endif
  return vmul(to_float(sum), vset(last ? x.scale : x.scale * 256.0f));
}

// The same factor as what it adds to the bits of a float.
OCTAVO_INLINE Words exponent(const Group<3>& x, bool last) {
  const Words of_scale = repeat_word(reinterpret_cast<const int8_t*>(&x.exponent));
  return last ? of_scale : add(of_scale, repeat(8 << 23));
}

// Whether the scales of a group of R rows can be exponents that are added to d, and not factors of the sums: both products
// are exact.
template <int R>
OCTAVO_INLINE bool have_exponents(const Group<3>* const* x, int64_t g) {
  int32_t all = 1;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) all &= x[r][g].has_exponent;
  return all != 0;
}

// Adds a group's products to the sums, scaled.
template <Format F, int N, int R, bool kExponents>
OCTAVO_INLINE void add_scaled(const Words (&products)[N][R][2], const Scales& weights, const Group<N>* const* x, int64_t g,
                              vf (&sums)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      vf sum = sums[r][i];
      if constexpr (F == Format::kQ4_1) sum = vfma(vset(x[r][g].offset), weights.m[i], sum);
      Words chain = repeat(0);
#pragma GCC unroll 3
      for (int digit = 0; digit < N; ++digit) {
        chain = begins_chain<F>(digit) ? products[digit][r][i] : add(shift_left<8>(chain), products[digit][r][i]);
        if (!ends_chain<F, N>(digit)) continue;
        const bool last = digit == N - 1;
        if constexpr (kExponents)
          sum = vfma(to_float(chain), add_exponent(weights.d[i], exponent(x[r][g], last)), sum);
        else
          sum = vfma(scaled<N>(chain, x[r][g], last), weights.d[i], sum);
      }
      sums[r][i] = sum;
    }
}

// Adds a group to the sums: the same bits whatever R is, wherever codes and scales were read from, and whether or not it is
// known that all d take exponents.
template <Format F, int N, int R, class Codes>
OCTAVO_INLINE void add_group(const Codes& codes, const Scales& weights, const Group<N>* const* x, int64_t g,
                             vf (&sums)[R][2], bool take_exponents) {
  Words products[N][R][2];
#pragma GCC unroll 3
  for (int digit = 0; digit < N; ++digit)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      products[digit][r][0] = products[digit][r][1] =
          ends_chain<F, N>(digit) ? correction<F, N>(x[r][g], digit) : repeat(0);
  codes.each_row([&](int row, Words first, Words second) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 3
    for (int digit = 0; digit < N; ++digit)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Words inputs = repeat_word(x[r][g].digits[digit] + 4 * row);
        products[digit][r][0] = add_codes<F>(products[digit][r][0], first, inputs);
        products[digit][r][1] = add_codes<F>(products[digit][r][1], second, inputs);
      }
  });
  if constexpr (N == 3) {
    if (__builtin_expect(take_exponents && have_exponents<R>(x, g), true))
      return add_scaled<F, N, R, true>(products, weights, x, g, sums);
  }
  add_scaled<F, N, R, false>(products, weights, x, g, sums);
}

template <Format F, int N, int R>
struct GroupsOfRows {
  const Group<N>* of[R];

  GroupsOfRows(const Product& product, int64_t first_row) {
    for (int r = 0; r < R; ++r) of[r] = rounded_row<F, N>(product, first_row + r);
  }
};

// ---- few rows: codes out of the panel -------------------------------------------------------------------------------

// R rows from part.first_row + row on times one panel.
template <Format F, int N, int R>
void few_rows(const Product& product, const Part& part, int64_t panel, int64_t row) {
  const GroupsOfRows<F, N, R> rows(product, part.first_row + row);
  const int64_t panel_bytes = bytes_of_panel(F, product.in_features);
  const uint8_t* weights = product.weight + (part.first_panel + panel) * panel_bytes;
  const uint8_t* end = weights + (part.num_panels - panel) * panel_bytes;
  const uint8_t* next = product.weight + part.next_panel * panel_bytes;
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[R][2];
    for (auto& both : sums) both[0] = both[1] = vzero();
    for (int64_t g = 0; g < product.in_features / kGroup; ++g) {
      const uint8_t* group = weights + g * bytes_of_group(F);
      if (row == 0 && column == 0) {
        const uint8_t* ahead = group + kBytesAhead;
        prefetch_to_second(ahead < end ? ahead : next + (ahead - end), bytes_of_group(F));
      }
      const auto* stored = reinterpret_cast<const uint16_t*>(group) + column;
      Scales scales;
      for (int i = 0; i < 2; ++i) {
        scales.d[i] = vload_f16(stored + i * W);
        scales.m[i] = F == Format::kQ4_1 ? load_m(stored + kPanel + i * W, scales.d[i]) : vzero();
      }
      add_group<F, N>(PackedCodes<F>(group + bytes_of_scales(F), column), scales, rows.of, g, sums, false);
    }
    for (int r = 0; r < R; ++r) {
      float* out = part.out + (row + r) * part.out_stride + panel * kPanel + column;
      for (int i = 0; i < 2; ++i) part.streams ? vstream(out + i * W, sums[r][i]) : vstore(out + i * W, sums[r][i]);
    }
  }
}

using FewRowsFunction = void (*)(const Product&, const Part&, int64_t, int64_t);
template <Format F, int N, int R>
constexpr FewRowsFunction few_rows_of() {
  if constexpr (R <= kMaxTileRows<N>) return &few_rows<F, N, R>;
  return nullptr;
}

// ---- more rows: codes of 4 bits and scales unpacked into L1 -------------------------------------------------------------------

// `next` is what will be needed afterwards: a tile asks for next_bytes of it with every group, evenly. At its beginning it asks
// for the lines that it writes at its end, which in a large output nobody has read before.
template <Format F, int N, int R>
void tile(const Product& product, const Chunk& chunk, const uint8_t* codes, int64_t first_group, int64_t num_groups,
          int64_t first_row, float* out, int64_t out_stride, const uint8_t* next, int64_t next_bytes) {
  const GroupsOfRows<F, N, R> rows(product, first_row);
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* at = out + r * out_stride + column;
      prefetch(reinterpret_cast<const uint8_t*>(at), sizeof sums[r]);
      sums[r][0] = first_group == 0 ? vzero() : vload(at);
      sums[r][1] = first_group == 0 ? vzero() : vload(at + W);
    }
    for (int64_t g = 0; g < num_groups; ++g) {
      prefetch(next + g * next_bytes, next_bytes);
      const float* d = chunk.d + g * kPanel + column;
      const float* m = F == Format::kQ4_1 ? chunk.m + g * kPanel + column : d;
      const Scales scales{{vload(d), vload(d + W)}, {vload(m), vload(m + W)}};
      add_group<F, N>(ByteCodes<F>(codes + g * kBytesOfCodes<F>, column), scales, rows.of, first_group + g, sums,
                      chunk.take_exponents[g]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* at = out + r * out_stride + column;
      vstore(at, sums[r][0]);
      vstore(at + W, sums[r][1]);
    }
  }
}

using TileFunction = void (*)(const Product&, const Chunk&, const uint8_t*, int64_t, int64_t, int64_t, float*, int64_t,
                              const uint8_t*, int64_t);
template <Format F, int N, int R>
constexpr TileFunction tile_of() {
  if constexpr (R <= kMaxTileRows<N>) return &tile<F, N, R>;
  return nullptr;
}

template <Format F, int N>
void many_rows(const Product& product, const Part& part, Chunk& chunk) {
  static constexpr TileFunction kTiles[] = {nullptr,           tile_of<F, N, 1>(), tile_of<F, N, 2>(), tile_of<F, N, 3>(),
                                            tile_of<F, N, 4>(), tile_of<F, N, 5>(), tile_of<F, N, 6>()};
  const int64_t num_tiles = (part.num_rows + kMaxTileRows<N> - 1) / kMaxTileRows<N>;
  const int64_t num_groups = product.in_features / kGroup;
  const int64_t num_chunks = (num_groups + kChunkGroups - 1) / kChunkGroups;
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * bytes_of_panel(F, product.in_features);
    for (int64_t c = 0; c < num_chunks; ++c) {  // chunks of nearly equal length
      const int64_t first = num_groups * c / num_chunks, count = num_groups * (c + 1) / num_chunks - first;
      const uint8_t* codes = unpack<F>(weights + first * bytes_of_group(F), count, chunk);
      const uint8_t* next = weights + (first + count) * bytes_of_group(F);
      const int64_t next_bytes = (bytes_of_group(F) / num_tiles + 63) / 64 * 64;
      for (int64_t t = 0; t < num_tiles; ++t) {  // tiles of nearly equal height
        const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
        float* out = part.out + row * part.out_stride + panel * kPanel;
        kTiles[stop - row](product, chunk, codes, first, count, part.first_row + row, out, part.out_stride,
                           next + t * count * next_bytes, next_bytes);
      }
    }
  }
}

template <Format F, int N>
void in_vectors(const Product& product, const Part& part, void* scratch) {
  static constexpr FewRowsFunction kFewRows[] = {nullptr,
                                                 few_rows_of<F, N, 1>(),
                                                 few_rows_of<F, N, 2>(),
                                                 few_rows_of<F, N, 3>(),
                                                 few_rows_of<F, N, 4>(),
                                                 few_rows_of<F, N, 5>(),
                                                 few_rows_of<F, N, 6>()};
  static_assert(sizeof(Chunk) <= kScratchBytes);
  if (part.num_rows > max_few_rows<N>()) return many_rows<F, N>(product, part, *static_cast<Chunk*>(scratch));
  const int64_t num_tiles = (part.num_rows + kMaxTileRows<N> - 1) / kMaxTileRows<N>;
  for (int64_t panel = 0; panel < part.num_panels; ++panel)
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
      kFewRows[stop - row](product, part, panel, row);
    }
}

template <Format F, int N>
void rounded(const Product& product, const Part& part, void* scratch) {
  Part rest = part;
#if defined(OCTAVO_HAS_TILES)
  static_assert(sizeof(TileChunk<F, N>) <= kScratchBytes);
  const int64_t in_tiles = std::min(num_in_tiles(product.num_rows) - part.first_row, part.num_rows);
  if (in_tiles > 0) {
    Part tiles = part;
    tiles.num_rows = in_tiles;
    multiply_in_tiles<F, N>(product, tiles, *static_cast<TileChunk<F, N>*>(scratch));
    rest.first_row += in_tiles;
    rest.num_rows -= in_tiles;
    rest.out += in_tiles * part.out_stride;
  }
#endif
  if (rest.num_rows > 0) in_vectors<F, N>(product, rest, scratch);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// Those for tiles come by sixteens.
template <Format F, int N>
void round_rows(const Product& product, int64_t first_row, int64_t num_rows, void* out) {
  const int64_t num_groups = product.in_features / kGroup, stop = first_row + num_rows;
  Product to = product;
  to.rounded = out;
  int64_t row = first_row;
#if defined(OCTAVO_HAS_TILES)
  for (; row < std::min(stop, num_in_tiles(product.num_rows)); row += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(stop - row, kTileRows));
    auto* groups = const_cast<TileGroup<F, N>*>(tile_rows<F, N>(to, row));
    for (int64_t g = 0; g < num_groups; ++g)
      round_groups(product.x + row * product.x_stride + g * kGroup, product.x_stride, count, groups[g]);
  }
#endif
  auto* groups = const_cast<Group<N>*>(rounded_row<F, N>(to, row));
  round_rows<N>(product.x + row * product.x_stride, product.x_stride, stop - row, num_groups, groups);
}

template <int N>
Method method_of(int64_t format) {
  Method method{};
  with_format(format, [&](auto tag) {
    constexpr Format F = tag.value;
    if constexpr (!is_dense(F)) method = {&rounded<F, N>, nullptr, kBytesOfGroup<F, N>, &round_rows<F, N>};
  });
  return method;
}

}  // namespace

Method int8_method(int64_t format) { return method_of<1>(format); }

#if defined(__AVX512VNNI__)
Method fixed_method(int64_t format) { return method_of<3>(format); }
bool fixed_is_faster(int64_t format) { return !is_dense(static_cast<Format>(format)); }
#else
Method fixed_method(int64_t) { return {}; }
bool fixed_is_faster(int64_t) { return false; }
#endif

}  // namespace octavo
