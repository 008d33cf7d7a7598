// noise and noise_at: random words and Gumbel noise of whole rows and of single columns.

#include "noise.h"

#include "ops.h"

namespace octavo {
namespace {

constexpr int64_t kColumnsOfTask = 4096;
constexpr int64_t kValuesOfTask = 1024;

void put(const uint32_t* words, int64_t num_columns, int64_t* out) {
  for (int64_t i = 0; i < num_columns; ++i) out[i] = words[i];
}

void put(const uint32_t* words, int64_t num_columns, float* out) {
  for (int64_t i = 0; i < num_columns; i += W) {
    vu32 x;
    std::memcpy(&x, words + i, sizeof x);
    const vf noise = gumbel(x);
    std::memcpy(out + i, &noise, (num_columns - i < W ? num_columns - i : W) * sizeof(float));
  }
}

template <class T>
void fill_columns(const Philox& philox, int64_t first, int64_t end, T* out) {
  for (int64_t column = first; column < end; column += 2 * W) {
    vu32 words[2];
    philox.columns(column / 4, words);
    uint32_t stored[2 * W];
    std::memcpy(stored, words, sizeof stored);
    put(stored, end - column < 2 * W ? end - column : 2 * W, out + column);
  }
}

uint32_t word_of(const NoiseAtArgs& a, int64_t value) {
  vu64 words[4];
  const auto column = static_cast<uint64_t>(a.columns[value]);
  Philox(a.seeds[value], a.sequence_index[value], a.positions[value]).blocks(splat(column / 4), words);
  return static_cast<uint32_t>(words[column % 4][0]);
}

}  // namespace

void noise(const NoiseArgs& args, int64_t num_rows, Team& team) {
  const int64_t num_slices = (args.num_columns + kColumnsOfTask - 1) / kColumnsOfTask;
  team.parallel_for(num_rows * num_slices, [&](int64_t task) {
    const int64_t row = task / num_slices, first = task % num_slices * kColumnsOfTask;
    const int64_t end = first + kColumnsOfTask < args.num_columns ? first + kColumnsOfTask : args.num_columns;
    const Philox philox(args.seeds[row], args.sequence_index[row], args.positions[row]);
    const int64_t start = row * args.num_columns;
    if (args.words) {
      fill_columns(philox, first, end, static_cast<int64_t*>(args.out) + start);
    } else {
      fill_columns(philox, first, end, static_cast<float*>(args.out) + start);
    }
  });
}

void noise_at(const NoiseAtArgs& args, int64_t num_values, Team& team) {
  team.parallel_for((num_values + kValuesOfTask - 1) / kValuesOfTask, [&](int64_t task) {
    const int64_t end = (task + 1) * kValuesOfTask < num_values ? (task + 1) * kValuesOfTask : num_values;
    for (int64_t first = task * kValuesOfTask; first < end; first += W) {
      const int64_t count = end - first < W ? end - first : W;
      uint32_t words[W] = {};
      for (int64_t i = 0; i < count; ++i) words[i] = word_of(args, first + i);
      put(words, count, args.out + first);
    }
  });
}

}  // namespace octavo
