// What every product begins with: how it is computed, and its rounded inputs.

#pragma once

#include "grouped.h"
#include "matmul.h"

namespace octavo {

constexpr int64_t kRowsRoundedAlone = 4;  // so few are rounded by every thread for itself, which saves a loop

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The product that some op's arguments ask for.
template <class Args>
Product product_of(const Args& args, int64_t num_rows) {
  Product product{args.x, static_cast<const uint8_t*>(args.weight), args.x_stride, num_rows, args.in_features, nullptr};
  if (has_planes(args.format)) product.planes = &plane_format(args.format);
  product.grid = static_cast<const uint8_t*>(args.grid);
  return product;
}

// The weights of a panel.
inline const uint8_t* panel_of(const Product& product, int64_t format, int64_t panel) {
  if (is_grouped(format)) return reinterpret_cast<const GroupedHeader*>(product.weight)->panel(panel);
  if (product.planes != nullptr)
    return product.weight + panel * bytes_of_panel(product.planes->planes, product.in_features);
  return product.weight + panel * bytes_of_panel(static_cast<Format>(format), product.in_features);
}

// How a product is computed, and the bytes of a rounded row.
inline Method method_of(int64_t format, bool int8_activations, const Product& product) {
  if (is_grouped(format)) return grouped_method(product);
  if (has_planes(format)) return planes_method(int8_activations);
  if (int8_activations) return int8_method(format);
  return fixed_is_faster(format) ? fixed_method(format) : fma_method(format);
}
inline int64_t bytes_of_rows(const Method& method, int64_t num_rows, int64_t in_features) {
  return num_rows * ceil_div(in_features, kGroup) * method.bytes_of_group;
}

// Rounds some rows of x as a method wants; `out` is where the first row of all would begin.
inline void round_some(const Method& method, const Product& product, int64_t first_row, int64_t num_rows, void* out) {
  if (method.prepare != nullptr) return method.prepare(product, first_row, num_rows, out);
  if (method.round != nullptr) method.round(product.x, product.x_stride, product.in_features, first_row, num_rows, out);
}

// Rounds all rows; returns on all threads when they can be read. `own` is the thread's memory for few rows.
inline const void* round_all(const Method& method, const Product& product, void* workspace, void* own, Team& team) {
  if (method.round == nullptr && method.prepare == nullptr) return nullptr;
  if (product.num_rows <= kRowsRoundedAlone) {
    round_some(method, product, 0, product.num_rows, own);
    return own;
  }
  const int64_t step = product.num_rows < 16 ? 8 : 16;  // sixteen lie together where they are multiplied in tiles
  team.parallel_for(ceil_div(product.num_rows, step), [&](int64_t task) {
    round_some(method, product, task * step, min(step, product.num_rows - task * step), workspace);
  });
  return workspace;
}

struct Memory {  // what a thread needs for a product
  uint8_t* scratch;
  void* rounded;

  Memory(Team& team, const Method& method, int64_t in_features, int64_t extra) {
    const int64_t rounded_bytes = round_up(bytes_of_rows(method, kRowsRoundedAlone, in_features), 64);
    rounded = team.scratch(rounded_bytes + kScratchBytes + extra);
    scratch = static_cast<uint8_t*>(rounded) + rounded_bytes;
  }
};

}  // namespace octavo
