// What the two kinds of products share: what a product is, and the function that computes a part of it.

#pragma once

#include <cstdint>

#include "ops.h"
#include "packed.h"

namespace octavo {

// Rows whose groups of 32 inputs were rounded to 8 bits.
struct Int8Rows {
  const int8_t* codes;   // [rows, in_features]
  const float* scales;   // [rows, groups]
  const float* offsets;  // [rows, groups]: scale times the sum of the codes
};

// num_rows rows times a packed weight.
struct Product {
  const float* x;
  const uint8_t* weight;
  int64_t x_stride;
  int64_t num_rows;
  int64_t in_features;
  Int8Rows int8;  // null pointers with fp32 activations
};

// The part of a product that a call computes: some rows times some panels. out [num_rows, 32 num_panels] is filled.
struct Part {
  int64_t first_row;
  int64_t num_rows;
  int64_t first_panel;
  int64_t num_panels;
  float* out;
  int64_t out_stride;
};

// scratch: kScratchBytes of the calling thread's own memory.
using PartFunction = void (*)(const Product&, const Part&, void* scratch);

constexpr int64_t kScratchBytes = 64 << 10;

// fp32 activations: an FMA chain per output, over the inputs in their order. Any format.
PartFunction exact_part(int64_t format);

// int8 activations: per output, groups in their order; within a group integers, whose order does not matter.
PartFunction int8_part(int64_t format);

// Rounds rows first_row .. first_row + num_rows - 1 of x; the arrays begin at row 0.
void round_rows(const float* x, int64_t x_stride, int64_t in_features, int64_t first_row, int64_t num_rows,
                int8_t* codes, float* scales, float* offsets);

}  // namespace octavo
