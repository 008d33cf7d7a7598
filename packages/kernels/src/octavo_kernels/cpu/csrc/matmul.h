// What the two kinds of products share: what a product is, and the function that computes a part of it.

#pragma once

#include <cstdint>

#include "ops.h"
#include "packed.h"
#include "planes.h"

namespace octavo {

// num_rows rows times a packed weight.
struct Product {
  const float* x;
  const uint8_t* weight;
  int64_t x_stride;
  int64_t num_rows;
  int64_t in_features;
  const void* rounded;  // [num_rows, groups] as the method rounds them, or null
  const PlaneFormat* planes = nullptr;  // of formats with planes
  const uint8_t* grid = nullptr;        // of those whose codes are points of one
};

// The part of a product that a call computes: some rows times some panels. out [num_rows, 32 num_panels] is filled.
struct Part {
  int64_t first_row;
  int64_t num_rows;
  int64_t first_panel;
  int64_t num_panels;
  int64_t next_panel;  // that the thread probably needs afterwards; one that exists or the one behind the last
  float* out;
  int64_t out_stride;
  bool streams = false;  // whether out is aligned and larger than caches; few rows are then written past them
};

// scratch: kScratchBytes of the calling thread's own memory.
using PartFunction = void (*)(const Product&, const Part&, void* scratch);

constexpr int64_t kScratchBytes = 64 << 10;

// How a product is computed: by `part`, from rows that `round` has rounded to bytes_of_group for every group of 32 inputs,
// or as they are if there is no such function.
struct Method {
  PartFunction part;
  void (*round)(const float* x, int64_t x_stride, int64_t in_features, int64_t first_row, int64_t num_rows, void* out);
  int64_t bytes_of_group;
  // In place of `round`, where rows must be known to be those of a weight: fills out [rows of the product] as above.
  void (*prepare)(const Product&, int64_t first_row, int64_t num_rows, void* out) = nullptr;
};

// Inputs as they are: an FMA chain per output, over the inputs in their order. Any format.
Method fma_method(int64_t format);

// Inputs as whole numbers of 24 bits, with a scale for each group of 32: mostly nearer the true sum than a chain, and faster
// where there is an instruction for sums of products of bytes. It exists only there, for block formats.
Method fixed_method(int64_t format);
bool fixed_is_faster(int64_t format);

// Inputs as whole numbers of 8 bits, with a scale for each group of 32. Block formats.
Method int8_method(int64_t format);

// Formats with planes: in 8 bits, or in full by whichever of the two ways is faster.
Method planes_method(bool int8_activations);
Method planes_fma_method();

// Grouped weights: an FMA chain per group of inputs. grouped.h has them.
constexpr bool is_grouped(int64_t format) { return format == static_cast<int64_t>(Format::kGrouped); }
Method grouped_method(const Product& product);

}  // namespace octavo
