// sample_tokens: draws one token per row of logits, by the largest of score and Gumbel noise.
//
// A row is read once for the largest logit of each chunk of columns, and once more for the draw. Distances are what the
// scores lie below the largest one: (best - logit) / temperature, so a kept token is one of small distance. Their bits,
// read as whole numbers, have the order of the distances. Each result is a function of the row alone: sums are made in
// the order of columns, and everything else is a comparison.

#include <limits>

#include "noise.h"
#include "ops.h"

namespace octavo {
namespace {

constexpr int64_t kChunk = 128;        // columns that share one largest logit
constexpr int64_t kChunksOfSlice = 32;  // of a row that several threads serve
constexpr int64_t kRowsOfThread = 4;   // with fewer, threads share rows
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// One bit per lane: a <= b, and not where either is NaN.
OCTAVO_INLINE uint32_t less_or_equal(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < W; ++i) lanes |= static_cast<uint32_t>(a[i] <= b[i]) << i;
  return lanes;
#endif
}

// One row's logits and how it is drawn.
struct Row {
  const float* logits;
  int64_t vocab_size;
  float temperature, top_p, min_p;
  int64_t top_k;
  Philox philox;

  Row(const SampleTokensArgs& a, int64_t row)
      : logits(a.logits + (a.source_rows == nullptr ? row : a.source_rows[row]) * a.logits_stride),
        vocab_size(a.vocab_size),
        temperature(a.temperature[row]),
        top_p(a.top_p == nullptr ? 1.0f : a.top_p[row]),
        min_p(a.min_p == nullptr ? 0.0f : a.min_p[row]),
        top_k(a.top_k == nullptr ? 0 : a.top_k[row]),
        philox(a.seeds[row], a.sequence_index[row], a.positions[row]) {}

  bool is_filtered() const { return temperature > 0.0f && (top_k > 0 || top_p < 1.0f || min_p > 0.0f); }
  int64_t num_chunks() const { return ceil_div(vocab_size, kChunk); }

  // The logits from a column on; past the end of the row, -inf.
  OCTAVO_INLINE vf load(int64_t column) const {
    if (column + W <= vocab_size) return vload(logits + column);
    float padded[W];
    for (int i = 0; i < W; ++i) padded[i] = column + i < vocab_size ? logits[column + i] : -kInfinity;
    return vload(padded);
  }
  OCTAVO_INLINE vf distances(vf best, int64_t column) const {
    return vdiv(vsub(best, load(column)), vset(temperature));
  }
  float distance(float best, float logit) const { return (best - logit) / temperature; }
};

// Writes the largest logit of each of some chunks; NaN for a chunk that holds NaN.
void measure(const Row& row, int64_t first_chunk, int64_t end_chunk, float* maxima) {
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    const int64_t end = min((chunk + 1) * kChunk, row.vocab_size);
    vf largest = vset(-kInfinity);
    vu32 size = {};  // without signs NaN is above infinity
    for (int64_t column = chunk * kChunk; column < end; column += W) {
      const vf x = row.load(column);
      const vu32 doubled = reinterpret_cast<vu32>(x) << 1;
      largest = vmax(x, largest);
      size = doubled > size ? doubled : size;
    }
    bool nan = false;
    for (int i = 0; i < W; ++i) nan |= size[i] > 0xFF000000u;
    maxima[chunk] = nan ? std::numeric_limits<float>::quiet_NaN() : vmax_of(largest);
  }
}

float best_of(const float* maxima, int64_t num_chunks) {
  float best = maxima[0];
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk)
    best = maxima[chunk] > best || maxima[chunk] != maxima[chunk] ? maxima[chunk] : best;
  return best;
}

int64_t first_column_of(const Row& row, float best, const float* maxima) {
  int64_t chunk = 0;
  while (maxima[chunk] != best) ++chunk;
  int64_t column = chunk * kChunk;
  while (row.logits[column] != best) ++column;
  return column;
}

// The largest sum of score and noise so far, and the first column that has it.
struct Winner {
  float value = kLowestNoise;  // the likeliest token alone has more
  int64_t column = 0;

  void take(const float* values, int num_values, int64_t first_column) {
    for (int i = 0; i < num_values; ++i)
      if (values[i] > value) value = values[i], column = first_column + i;
  }
};

// Draws from some chunks of a row without filters. The noise of a column is worked out where a cheap bound of it says
// that the column may win, which is seldom.
Winner draw(const Row& row, float best, const float* maxima, int64_t first_chunk, int64_t end_chunk) {
  Winner winner;
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    if (kHighestNoise - row.distance(best, maxima[chunk]) < winner.value) continue;
    const int64_t end = min((chunk + 1) * kChunk, row.vocab_size);
    for (int64_t column = chunk * kChunk; column < end; column += 2 * W) {
      vu32 words[2];
      row.philox.columns(column / 4, words);
      for (int i = 0; i < 2; ++i) {
        const vf distance = row.distances(vset(best), column + i * W);
        if (!less_or_equal(vset(winner.value), vsub(gumbel_bound(words[i]), distance))) continue;
        float values[W];
        vstore(values, vsub(gumbel(words[i]), distance));
        winner.take(values, W, column + i * W);
      }
    }
  }
  return winner;
}

// The tokens that may be drawn, in the order of columns.
struct Candidates {
  float* distances;
  float* weights;
  int32_t* columns;
  int64_t num = 0;

  Candidates(uint8_t* memory, int64_t vocab_size)
      : distances(reinterpret_cast<float*>(memory)),
        weights(distances + round_up(vocab_size)),
        columns(reinterpret_cast<int32_t*>(weights + round_up(vocab_size))) {}

  // With room for a vector that begins at the last one.
  static int64_t round_up(int64_t vocab_size) { return ceil_div(vocab_size + W, W) * W; }
  static int64_t num_bytes(int64_t vocab_size) { return round_up(vocab_size) * 12; }

  void collect(const Row& row, float best, const float* maxima, float farthest) {
    for (int64_t chunk = 0; chunk < row.num_chunks(); ++chunk) {
      if (row.distance(best, maxima[chunk]) > farthest) continue;
      const int64_t end = min((chunk + 1) * kChunk, row.vocab_size);
      for (int64_t column = chunk * kChunk; column < end; column += W) {
        const vf near = row.distances(vset(best), column);
        uint32_t lanes = less_or_equal(near, vset(farthest));
        if (lanes == 0) continue;
        float stored[W];
        vstore(stored, near);
        for (; lanes != 0; lanes &= lanes - 1, ++num) {
          const int lane = __builtin_ctz(lanes);
          if (column + lane >= row.vocab_size) break;
          distances[num] = stored[lane];
          columns[num] = static_cast<int32_t>(column + lane);
        }
      }
    }
  }

  void keep(float farthest) {
    int64_t kept = 0;
    for (int64_t i = 0; i < num; ++i) {
      distances[kept] = distances[i];
      columns[kept] = columns[i];
      kept += distances[i] <= farthest;
    }
    num = kept;
  }

  // Probabilities as multiples of the largest one; returns their sum.
  double weigh() {
    double sum = 0.0;
    for (int64_t i = 0; i < num; i += W) vstore(weights + i, vexp(vsub(vzero(), vload(distances + i))));
    for (int64_t i = 0; i < num; ++i) sum += weights[i];
    return sum;
  }
};

// Returns the smallest of some distances such that those up to it weigh at least `wanted` together; without weights each
// weighs 1. If all together weigh less, the largest. Three rounds of a radix sort that follow the one bin each.
float select(const float* distances, const float* weights, int64_t num, double wanted) {
  uint32_t prefix = 0, known = 0;
  double held = 0.0;  // by smaller distances
  for (int shift = 20; shift >= 0; shift -= 10) {
    const uint32_t num_bins = shift == 20 ? 2048 : 1024;
    double bins[2048] = {};
    bool used[2048] = {};
    for (int64_t i = 0; i < num; ++i) {
      const uint32_t bits = bits_of(distances[i]);
      if ((bits & known) != prefix) continue;
      const uint32_t bin = (bits >> shift) & (num_bins - 1);
      bins[bin] += weights == nullptr ? 1.0 : weights[i];
      used[bin] = true;
    }
    uint32_t last = num_bins - 1, bin = 0;
    while (!used[last]) --last;
    while (bin < last && (!used[bin] || held + bins[bin] < wanted)) held += bins[bin++];
    prefix |= bin << shift;
    known |= (num_bins - 1) << shift;
  }
  return float_of(prefix);
}

using vhalf = float __attribute__((vector_size(2 * W)));
using vdouble = double __attribute__((vector_size(4 * W)));

// The probabilities of a whole row as multiples of the largest one, summed.
double weigh_all(const Row& row, float best) {
  vdouble sums[2] = {};
  for (int64_t column = 0; column < row.vocab_size; column += W) {
    const vf weights = vexp(vsub(vzero(), row.distances(vset(best), column)));
    vhalf halves[2];
    std::memcpy(halves, &weights, sizeof halves);
    for (int i = 0; i < 2; ++i) sums[i] += __builtin_convertvector(halves[i], vdouble);
  }
  double sum = 0.0;
  for (int i = 0; i < W / 2; ++i) sum += sums[0][i] + sums[1][i];
  return sum;
}

// A distance beyond which top_p keeps nothing. Tokens that weigh less than (1 - top_p) / vocab_size of the whole weigh
// less than 1 - top_p together, so the others hold top_p.
float farthest_of_top_p(const Row& row, double sum) {
  const double least = (1.0 - static_cast<double>(row.top_p)) * sum / static_cast<double>(row.vocab_size);
  float log[W];
  vstore(log, vlog(vset(static_cast<float>(least))));
  return 1e-3f - log[0];
}

// The distance of min_p. A min_p that is no normal number is taken as the smallest that is.
float farthest_of_min_p(const Row& row) {
  const float smallest = std::numeric_limits<float>::min();
  float log[W];
  vstore(log, vlog(vset(row.min_p < smallest ? smallest : row.min_p)));
  return -log[0];
}

// A distance within which the k nearest tokens lie, if k chunks have a nearest token each.
float farthest_of_top_k(const Row& row, float best, const float* maxima, float* distances) {
  if (row.top_k > row.num_chunks()) return kInfinity;
  for (int64_t chunk = 0; chunk < row.num_chunks(); ++chunk) distances[chunk] = row.distance(best, maxima[chunk]);
  return select(distances, nullptr, row.num_chunks(), static_cast<double>(row.top_k));
}

int64_t draw_candidate(const Row& row, const Candidates& candidates) {
  Winner winner;
  for (int64_t first = 0; first < candidates.num; first += W / 2) {
    const int count = static_cast<int>(min(W / 2, candidates.num - first));
    vu64 numbers = {}, blocks[4];
    for (int i = 0; i < count; ++i) numbers[i] = static_cast<uint32_t>(candidates.columns[first + i]) / 4;
    row.philox.blocks(numbers, blocks);
    vu32 words = {};
    for (int i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(blocks[candidates.columns[first + i] % 4][i]);
    float values[W];
    vstore(values, vsub(gumbel(words), vload(candidates.distances + first)));
    winner.take(values, count, first);
  }
  return candidates.columns[winner.column];
}

// Draws from a row with filters: min_p, then top_k, then top_p. Tokens as far as the last one kept are kept as well.
int64_t draw_filtered(const Row& row, float best, const float* maxima, uint8_t* memory) {
  Candidates candidates(memory, row.vocab_size);
  const bool by_top_k = row.top_k > 0, by_top_p = row.top_p < 1.0f;
  const float by_min_p = row.min_p > 0.0f ? farthest_of_min_p(row) : kInfinity;
  float farthest = by_min_p;
  double sum = 0.0;
  if (by_top_k) {
    const float bound = farthest_of_top_k(row, best, maxima, candidates.distances);
    farthest = bound < farthest ? bound : farthest;
  } else if (by_top_p && by_min_p == kInfinity) {
    sum = weigh_all(row, best);
    farthest = farthest_of_top_p(row, sum);
  }
  candidates.collect(row, best, maxima, farthest);
  if (by_top_k && row.top_k < candidates.num)
    candidates.keep(select(candidates.distances, nullptr, candidates.num, static_cast<double>(row.top_k)));
  if (by_top_p) {
    const double held = candidates.weigh();
    const double wanted = static_cast<double>(row.top_p) * (sum > 0.0 ? sum : held);
    candidates.keep(select(candidates.distances, candidates.weights, candidates.num, wanted));
  }
  return draw_candidate(row, candidates);
}

int64_t draw_whole(const Row& row, float best, const float* maxima, uint8_t* memory) {
  if (row.temperature == 0.0f) return first_column_of(row, best, maxima);
  if (row.is_filtered()) return draw_filtered(row, best, maxima, memory);
  return draw(row, best, maxima, 0, row.num_chunks()).column;
}

bool is_finite(float x) { return x - x == 0.0f; }

// Rows dealt out whole: the second reading finds a row in the cache.
void sample_rows(const SampleTokensArgs& args, int64_t num_rows, Team& team) {
  const int64_t num_chunks = ceil_div(args.vocab_size, kChunk);
  auto* memory = static_cast<uint8_t*>(
      team.scratch(Candidates::num_bytes(args.vocab_size) + num_chunks * static_cast<int64_t>(sizeof(float))));
  auto* maxima = reinterpret_cast<float*>(memory + Candidates::num_bytes(args.vocab_size));
  team.parallel_for(num_rows, [&](int64_t index) {
    const Row row(args, index);
    measure(row, 0, num_chunks, maxima);
    const float best = best_of(maxima, num_chunks);
    args.best[index] = best;
    args.token_ids[index] = is_finite(best) ? draw_whole(row, best, maxima, memory) : 0;
  });
}

// Few rows, cut into slices for the threads; only a row with filters is drawn from by one thread.
void sample_slices(const SampleTokensArgs& args, int64_t num_rows, Team& team) {
  const int64_t num_chunks = ceil_div(args.vocab_size, kChunk), num_slices = ceil_div(num_chunks, kChunksOfSlice);
  auto* memory = static_cast<uint8_t*>(team.scratch(Candidates::num_bytes(args.vocab_size)));
  const int64_t num_winners = num_rows * num_slices;
  auto* winners = static_cast<Winner*>(team.shared(num_winners * sizeof(Winner) + num_rows * num_chunks * sizeof(float)));
  auto* maxima = reinterpret_cast<float*>(winners + num_winners);
  team.parallel_for(num_rows * num_slices, [&](int64_t task) {
    const int64_t index = task / num_slices, first = task % num_slices * kChunksOfSlice;
    measure(Row(args, index), first, min(first + kChunksOfSlice, num_chunks), maxima + index * num_chunks);
  });
  team.parallel_for(num_rows * num_slices, [&](int64_t task) {
    const int64_t index = task / num_slices, slice = task % num_slices, first = slice * kChunksOfSlice;
    const Row row(args, index);
    const float* own = maxima + index * num_chunks;
    const float best = best_of(own, num_chunks);
    winners[task] = Winner{};
    if (slice == 0) args.best[index] = best;
    if (!is_finite(best)) return;
    if (row.temperature > 0.0f && !row.is_filtered()) {
      winners[task] = draw(row, best, own, first, min(first + kChunksOfSlice, num_chunks));
    } else if (slice == 0) {
      winners[task].column = draw_whole(row, best, own, memory);
    }
  });
  team.parallel_for(num_rows, [&](int64_t index) {
    Winner winner = winners[index * num_slices];
    for (int64_t slice = 1; slice < num_slices; ++slice) {
      const Winner& other = winners[index * num_slices + slice];
      winner = other.value > winner.value ? other : winner;
    }
    args.token_ids[index] = winner.column;
  });
}

}  // namespace

void sample_tokens(const SampleTokensArgs& args, int64_t num_rows, Team& team) {
  const bool whole = team.num_threads() == 1 || num_rows >= kRowsOfThread * team.num_threads();
  whole ? sample_rows(args, num_rows, team) : sample_slices(args, num_rows, team);
}

}  // namespace octavo
