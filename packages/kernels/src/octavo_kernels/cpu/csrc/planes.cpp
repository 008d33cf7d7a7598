// Weights whose codes lie in planes: how a file's blocks are packed, how groups are unpacked, and lookups of rows.

#include "pack_grids.h"
#include "pack_planes.h"
#include "plane_codes.h"

namespace octavo {
namespace {

constexpr int kBlock = 256;  // inputs of a stored block, at most

// What a block of a file holds, one output's part of it.
struct Stored {
  uint8_t codes[kBlock];
  const uint8_t* d;
  const uint8_t* m;
  uint8_t scales[16];  // as bytes with a sign; with nibble_scales the minimums too
  uint8_t minimums[16];
};

constexpr int bytes_of_stored(Format f) {
  switch (f) {
    case Format::kQ5_0: return 22;
    case Format::kQ5_1: return 24;
    case Format::kQ2_K: return 84;
    case Format::kQ3_K: return 110;
    case Format::kQ4_K: return 144;
    case Format::kQ5_K: return 176;
    case Format::kQ6_K: return 210;
    case Format::kIQ4_NL: return 18;
    case Format::kIQ4_XS: return 136;
    case Format::kMXFP4: return 17;
    case Format::kNVFP4: return 36;
    case Format::kQ8_K: return 292;
    case Format::kTQ2_0: return 66;
    case Format::kTQ1_0: return 54;
    case Format::kIQ2_XXS: return 66;
    case Format::kIQ2_XS: return 74;
    case Format::kIQ2_S: return 82;
    case Format::kIQ3_XXS: return 98;
    case Format::kIQ3_S: return 110;
    case Format::kIQ1_S: return 50;
    case Format::kIQ1_M: return 56;
    default: return 0;
  }
}

// Field k of bytes that come in runs: the lowest bits of a whole run first, then its next bits.
template <int Bits, int Run>
int field(const uint8_t* bytes, int k) {
  constexpr int kFields = Run * 8 / Bits;
  const int place = k % kFields;
  return (bytes[k / kFields * Run + place % Run] >> (place / Run * Bits)) & ((1 << Bits) - 1);
}

// Adds the fields of a plane of the file to codes, `Shift` bits up.
template <int Bits, int Run, int Shift>
void add_fields(const uint8_t* bytes, int num_codes, uint8_t* codes) {
  for (; num_codes > 0; num_codes -= Run * 8 / Bits, bytes += Run)
    for (int bit = 0; bit < 8; bit += Bits, codes += Run)
      for (int i = 0; i < Run; ++i) codes[i] |= static_cast<uint8_t>(((bytes[i] >> bit) & ((1 << Bits) - 1)) << Shift);
}

// Codes of low bits, and high bits if there are any.
template <Format F, int LowRun, int HighRun = 1>
void read_codes(const uint8_t* low, const uint8_t* high, Stored& out) {
  constexpr Planes kPlanes = planes_of(F);
  constexpr int kCodes = kPlanes.groups_of_block * kGroup;
  std::memset(out.codes, 0, kCodes);
  add_fields<kPlanes.low_bits, LowRun, 0>(low, kCodes, out.codes);
  if constexpr (kPlanes.high_bits > 0) add_fields<kPlanes.high_bits, HighRun, kPlanes.low_bits>(high, kCodes, out.codes);
}

// 8 scales and 8 minimums of 6 bits: four of each in the low bits of 8 bytes, whose high bits belong to the other four of
// each; these have their low bits in four bytes more.
void read_six_bits(const uint8_t* packed, Stored& out) {
  for (int i = 0; i < 4; ++i) {
    out.scales[i] = packed[i] & 63;
    out.minimums[i] = packed[4 + i] & 63;
    out.scales[4 + i] = static_cast<uint8_t>((packed[8 + i] & 15) | ((packed[i] >> 6) << 4));
    out.minimums[4 + i] = static_cast<uint8_t>((packed[8 + i] >> 4) | ((packed[4 + i] >> 6) << 4));
  }
}

template <Format F>
void read_block(const uint8_t* block, Stored& out) {
  out.d = block;
  out.m = block + 2;
  if constexpr (F == Format::kQ5_0) read_codes<F, 16>(block + 6, block + 2, out);
  if constexpr (F == Format::kQ5_1) read_codes<F, 16>(block + 8, block + 4, out);
  if constexpr (F == Format::kIQ4_NL) read_codes<F, 16>(block + 2, nullptr, out);
  if constexpr (F == Format::kQ2_K) {
    out.d = block + 80;
    out.m = block + 82;
    std::memcpy(out.scales, block, 16);
    read_codes<F, 32>(block + 16, nullptr, out);
  }
  if constexpr (F == Format::kQ3_K) {
    out.d = block + 108;
    for (int i = 0; i < 16; ++i)
      out.scales[i] = static_cast<uint8_t>((field<4, 8>(block + 96, i) | field<2, 4>(block + 104, i) << 4) - 32);
    read_codes<F, 32, 32>(block + 32, block, out);
  }
  if constexpr (F == Format::kQ4_K || F == Format::kQ5_K) read_six_bits(block + 4, out);
  if constexpr (F == Format::kQ4_K) read_codes<F, 32>(block + 16, nullptr, out);
  if constexpr (F == Format::kQ5_K) read_codes<F, 32, 32>(block + 48, block + 16, out);
  if constexpr (F == Format::kQ6_K) {
    out.d = block + 208;
    std::memcpy(out.scales, block + 192, 16);
    read_codes<F, 64, 32>(block, block + 128, out);
  }
  if constexpr (F == Format::kMXFP4) {
    out.scales[0] = block[0];
    read_codes<F, 16>(block + 1, nullptr, out);
  }
  if constexpr (F == Format::kNVFP4) {
    for (int i = 0; i < 4; ++i) out.scales[i] = block[i] == 0x7F ? 0 : block[i];  // which the file means by it
    read_codes<F, 8>(block + 4, nullptr, out);
  }
  if constexpr (F == Format::kQ8_K)
    for (int i = 0; i < kBlock; ++i) out.codes[i] = static_cast<uint8_t>(block[4 + i] ^ 0x80u);
  if constexpr (F == Format::kTQ2_0) {
    out.d = block + 64;
    read_codes<F, 32>(block, nullptr, out);
  }
  if constexpr (F == Format::kIQ4_XS) {
    for (int i = 0; i < 8; ++i)
      out.scales[i] = static_cast<uint8_t>((field<4, 1>(block + 4, i) | field<2, 1>(block + 2, i) << 4) - 32);
    read_codes<F, 16>(block + 8, nullptr, out);
  }
}

// Writes Bits bits of 32 codes into one output's words of a plane: rows of 32 words, as many fields in a byte as fit.
template <int Bits, int Shift>
void write_plane(const uint8_t* codes, uint8_t* plane, int column) {
  constexpr int kFields = 8 / Bits;
  constexpr uint32_t kMask = ((1u << Bits) - 1) * 0x01010101u;
  for (int row = 0; row < kWordRows / kFields; ++row) {
    uint32_t word = 0;  // four bytes side by side
    for (int j = 0; j < kFields; ++j) {
      uint32_t four;
      std::memcpy(&four, codes + 4 * (row * kFields + j), 4);
      word |= ((four >> Shift) & kMask) << (j * Bits);
    }
    std::memcpy(plane + (row * kPanel + column) * 4, &word, 4);
  }
}

// Writes one output's part of a block.
template <Format F>
void write_block(const Stored& stored, uint8_t* block, int column) {
  constexpr Planes kPlanes = planes_of(F);
  if constexpr (kPlanes.unit == UnitType::kHalf) std::memcpy(block + 2 * column, stored.d, 2);
  if constexpr (kPlanes.unit == UnitType::kFloat) std::memcpy(block + 4 * column, stored.d, 4);
  if constexpr (kPlanes.minimum) std::memcpy(block + 2 * kPanel + 2 * column, stored.m, 2);
  for (int i = 0; i < kPlanes.groups_of_block * kPlanes.scales_of_group; ++i) {
    block[start_of_scales(kPlanes) + i * kPanel + column] = stored.scales[i];
    if constexpr (kPlanes.minimum && !kPlanes.nibble_scales)
      block[start_of_minimums(kPlanes) + i * kPanel + column] = stored.minimums[i];
  }
  for (int g = 0; g < kPlanes.groups_of_block; ++g) {
    uint8_t* low = block + start_of_codes(kPlanes) + g * bytes_of_codes(kPlanes);
    write_plane<kPlanes.low_bits, 0>(stored.codes + g * kGroup, low, column);
    if constexpr (kPlanes.high_bits > 0)
      write_plane<kPlanes.high_bits, kPlanes.low_bits>(stored.codes + g * kGroup,
                                                       low + kPanel * kGroup * kPlanes.low_bits / 8, column);
  }
}

template <Format F>
void pack_block(const uint8_t* stored, uint8_t* block, int column) {
  if constexpr (F == Format::kTQ1_0) {
    pack_digits(stored, block, column);
  } else if constexpr (planes_of(F).code == Code::kGrid) {
    pack_grid<F>(stored, block, column);
  } else {
    Stored fields;
    read_block<F>(stored, fields);
    write_block<F>(fields, block, column);
  }
}

template <Format F>
void unpack_group(const uint8_t* block, int group, const uint8_t* grid, UnpackedGroup& out) {
  for (int column = 0; column < kPanel; column += W) {
    const CodesOf<F> codes(block, group, column, grid);
    uint8_t* words = out.codes + 4 * column;
    const auto store = [&](int row, Words code) { store_words(words + row * 4 * kPanel, code); };
    store(0, codes.template row<0>()), store(1, codes.template row<1>());
    store(2, codes.template row<2>()), store(3, codes.template row<3>());
    store(4, codes.template row<4>()), store(5, codes.template row<5>());
    store(6, codes.template row<6>()), store(7, codes.template row<7>());
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && planes_of(F).scales_of_group < 2) break;
      const PlaneScale scale = plane_scale<F>(block, group, half, column);
      vstore(out.d[half] + column, scale.d);
      vstore(out.m[half] + column, scale.m);
    }
  }
}

template <Format F>
constexpr PlaneFormat kFormat{F, planes_of(F), bytes_of_stored(F), &pack_block<F>, &unpack_group<F>};

void pack_panel(const PackWeightArgs& args, int64_t panel) {
  const PlaneFormat& format = plane_format(args.format);
  const int64_t num_blocks = args.in_features / (kGroup * format.planes.groups_of_block);
  const int64_t panel_bytes = bytes_of_panel(format.planes, args.in_features), first = panel * kPanel;
  auto* out = static_cast<uint8_t*>(args.packed) + panel * panel_bytes;
  const int64_t num_columns = args.out_features - first < kPanel ? args.out_features - first : kPanel;
  if (num_columns < kPanel) std::memset(out, 0, panel_bytes);
  const auto* stored = static_cast<const uint8_t*>(args.stored) + first * num_blocks * format.bytes_of_stored;
  for (int64_t b = 0; b < num_blocks; ++b)
    for (int64_t column = 0; column < num_columns; ++column)
      format.pack(stored + (column * num_blocks + b) * format.bytes_of_stored, out + b * bytes_of_block(format.planes),
                  static_cast<int>(column));
}

// The weights of an output, as the file means them.
void read_row(const PlaneFormat& format, const void* weight, const uint8_t* grid, int64_t in_features, int64_t output,
              float* out) {
  const Planes& planes = format.planes;
  const auto* panel = static_cast<const uint8_t*>(weight) + output / kPanel * bytes_of_panel(planes, in_features);
  const int64_t column = output % kPanel;
  for (int64_t g = 0; g < in_features / kGroup; ++g) {
    UnpackedGroup group;
    format.unpack(panel + g / planes.groups_of_block * bytes_of_block(planes),
                  static_cast<int>(g % planes.groups_of_block), grid, group);
    for (int k = 0; k < kGroup; ++k) {
      const int half = planes.scales_of_group == 2 ? k / (kGroup / 2) : 0;
      const int code = group.codes[(k / 4 * kPanel + column) * 4 + k % 4];
      const float d = group.d[half][column];
      // Both products are exact, so that there is one rounding at most, and a zero has the sign of its product.
      out[g * kGroup + k] = planes.minimum ? d * static_cast<float>(code) + group.m[half][column]
                                           : d * static_cast<float>(code - planes.centre);
    }
  }
}

}  // namespace

const PlaneFormat& plane_format(int64_t format) {
  static constexpr PlaneFormat kFormats[] = {
      kFormat<Format::kQ5_0>, kFormat<Format::kQ5_1>, kFormat<Format::kQ2_K>,
      kFormat<Format::kQ3_K>, kFormat<Format::kQ4_K>, kFormat<Format::kQ5_K>,
      kFormat<Format::kQ6_K>, kFormat<Format::kIQ4_NL>, kFormat<Format::kIQ4_XS>,
      kFormat<Format::kMXFP4>, kFormat<Format::kNVFP4>, kFormat<Format::kQ8_K>,
      kFormat<Format::kTQ2_0>, kFormat<Format::kTQ1_0>, kFormat<Format::kIQ2_XXS>,
      kFormat<Format::kIQ2_XS>, kFormat<Format::kIQ2_S>, kFormat<Format::kIQ3_XXS>,
      kFormat<Format::kIQ3_S>, kFormat<Format::kIQ1_S>, kFormat<Format::kIQ1_M>};
  return kFormats[format - static_cast<int64_t>(Format::kQ5_0)];
}

void pack_planes(const PackWeightArgs& args, Team& team) {
  team.parallel_for((args.out_features + kPanel - 1) / kPanel, [&](int64_t panel) { pack_panel(args, panel); });
}

void read_planes(const PackedEmbeddingArgs& args, int64_t row) {
  read_row(plane_format(args.format), args.weight, static_cast<const uint8_t*>(args.grid), args.in_features,
           args.token_ids[row], args.out + row * args.out_stride);
}

}  // namespace octavo
