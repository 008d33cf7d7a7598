// Packing of weights as checkpoints store them, and the lookup of single rows in packed ones.

#include <cstring>

#include "ops.h"
#include "pack_planes.h"
#include "packed.h"

namespace octavo {
namespace {

constexpr int kBlockHeader(Format f) { return f == Format::kQ4_1 ? 4 : 2; }  // bytes of d, and m, before the codes
constexpr int64_t bytes_of_block(Format f) { return kBlockHeader(f) + kGroup * bits_of_code(f) / 8; }

// The codes of one stored block as bytes: 0 .. 15, or code + 128.
template <Format F>
void read_codes(const uint8_t* stored, uint8_t* codes) {
  const uint8_t* bytes = stored + kBlockHeader(F);
  if constexpr (F == Format::kQ8_0) {
    for (int k = 0; k < kGroup; ++k) codes[k] = static_cast<uint8_t>(bytes[k] ^ 0x80u);
  } else {
    for (int k = 0; k < kGroup / 2; ++k) {
      codes[k] = bytes[k] & 15u;
      codes[k + kGroup / 2] = bytes[k] >> 4;
    }
  }
}

// Writes one output's part of a group: scale, minimum, and its word of every row.
template <Format F>
void write_group(const uint8_t* stored, uint8_t* group, int column) {
  uint8_t codes[kGroup];
  read_codes<F>(stored, codes);
  std::memcpy(group + 2 * column, stored, 2);
  if constexpr (F == Format::kQ4_1) std::memcpy(group + 2 * kPanel + 2 * column, stored + 2, 2);
  uint8_t* words = group + bytes_of_scales(F) + 4 * column;
  if constexpr (F == Format::kQ8_0) {
    for (int row = 0; row < 8; ++row) std::memcpy(words + row * 4 * kPanel, codes + 4 * row, 4);
  } else {
    for (int row = 0; row < 4; ++row)
      for (int b = 0; b < 4; ++b)
        words[row * 4 * kPanel + b] = static_cast<uint8_t>(codes[8 * row + b] | (codes[8 * row + 4 + b] << 4));
  }
}

template <Format F>
void fill_with_zero_weights(uint8_t* panel, int64_t in_features) {
  std::memset(panel, 0, bytes_of_panel(F, in_features));
  if constexpr (F == Format::kQ8_0)
    for (int64_t g = 0; g < in_features / kGroup; ++g)
      std::memset(panel + g * bytes_of_group(F) + bytes_of_scales(F), 128, kGroup * kPanel);
}

template <Format F>
void pack_panel(const PackWeightArgs& args, int64_t panel) {
  auto* out = static_cast<uint8_t*>(args.packed) + panel * bytes_of_panel(F, args.in_features);
  const auto* stored = static_cast<const uint8_t*>(args.stored);
  const int64_t first = panel * kPanel;
  const int64_t num_columns = args.out_features - first < kPanel ? args.out_features - first : kPanel;
  if (num_columns < kPanel) fill_with_zero_weights<F>(out, args.in_features);
  if constexpr (is_dense(F)) {
    constexpr int64_t size = bytes_of_value(F);
    for (int64_t k = 0; k < args.in_features; ++k)
      for (int64_t column = 0; column < num_columns; ++column)
        std::memcpy(out + (k * kPanel + column) * size, stored + ((first + column) * args.in_features + k) * size, size);
  } else {
    const int64_t num_groups = args.in_features / kGroup;
    for (int64_t g = 0; g < num_groups; ++g)
      for (int64_t column = 0; column < num_columns; ++column)
        write_group<F>(stored + ((first + column) * num_groups + g) * bytes_of_block(F), out + g * bytes_of_group(F),
                       static_cast<int>(column));
  }
}

// The value of weight [output, k]; the same arithmetic as in products.
template <Format F>
void read_row(const void* weight, int64_t in_features, int64_t output, float* out) {
  const auto* panel = static_cast<const uint8_t*>(weight) + output / kPanel * bytes_of_panel(F, in_features);
  const int64_t column = output % kPanel;
  if constexpr (is_dense(F)) {
    for (int64_t k = 0; k < in_features; ++k) {
      const uint8_t* value = panel + (k * kPanel + column) * bytes_of_value(F);
      if constexpr (F == Format::kF32) {
        std::memcpy(out + k, value, 4);
      } else {
        out[k] = F == Format::kBF16 ? from_bf16(read_u16(value)) : f16_value(read_u16(value));
      }
    }
  } else {
    for (int64_t g = 0; g < in_features / kGroup; ++g) {
      const uint8_t* group = panel + g * bytes_of_group(F);
      const float d = f16_value(read_u16(group + 2 * column));
      const uint8_t* words = group + bytes_of_scales(F) + 4 * column;
      float* values = out + g * kGroup;
      if constexpr (F == Format::kQ8_0) {
        for (int k = 0; k < kGroup; ++k) values[k] = d * static_cast<float>(words[k / 4 * 4 * kPanel + k % 4] - 128);
      } else {
        for (int k = 0; k < kGroup; ++k) {
          const int code = (words[k / 8 * 4 * kPanel + k % 4] >> (k % 8 / 4 * 4)) & 15;
          if constexpr (F == Format::kQ4_0) {
            values[k] = d * static_cast<float>(code - 8);
          } else {
            values[k] = d * static_cast<float>(code) + f16_value(read_u16(group + 2 * kPanel + 2 * column));
          }
        }
      }
    }
  }
}

}  // namespace

void pack_weight(const PackWeightArgs& args, Team& team) {
  if (has_planes(args.format)) return pack_planes(args, team);
  with_format(args.format, [&](auto format) {
    const int64_t num_panels = (args.out_features + kPanel - 1) / kPanel;
    team.parallel_for(num_panels, [&](int64_t panel) { pack_panel<format.value>(args, panel); });
  });
}

void packed_embedding(const PackedEmbeddingArgs& args, int64_t num_rows, Team& team) {
  if (has_planes(args.format)) return team.parallel_for(num_rows, [&](int64_t row) { read_planes(args, row); });
  with_format(args.format, [&](auto format) {
    constexpr int64_t kRowsOfTask = 8;
    team.parallel_for((num_rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task) {
      const int64_t stop = task * kRowsOfTask + kRowsOfTask < num_rows ? task * kRowsOfTask + kRowsOfTask : num_rows;
      for (int64_t row = task * kRowsOfTask; row < stop; ++row)
        read_row<format.value>(args.weight, args.in_features, args.token_ids[row], args.out + row * args.out_stride);
    });
  });
}

}  // namespace octavo
