// packed_sample: sample_tokens without filters, from the products of packed weights, most of which are only screened.
//
// Rough products bound what a column's sum of score and noise can be: those that may have the largest logit are computed
// in full, and then those that may win. What is drawn is what sample_tokens draws from all products in full, since every
// step from a logit to its sum is the same there, and none of them falls where the logit rises.

#include "largest.h"
#include "noise.h"
#include "screen.h"

namespace octavo {
namespace {

constexpr float kRoundings = 1e-5f;  // more than a few roundings of fp32
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A row of rough products, and how far they may be off.
struct Rough {
  const float* products;
  const float* norms;
  int64_t num_columns;
  float error;

  int64_t num_panels() const { return ceil_div(num_columns, kPanel); }
  int64_t columns_of(int64_t panel) const { return min(kPanel, num_columns - panel * kPanel); }

  // At least the products in full from a column on; past the end of the row, those of no column.
  OCTAVO_INLINE vf most(int64_t column) const {
    if (column + W <= num_columns) return vfma(vset(error), vload(norms + column), vload(products + column));
    float padded[W];
    for (int64_t i = 0; i < W; ++i)
      padded[i] = column + i < num_columns ? products[column + i] + error * norms[column + i] : -kInfinity;
    return vload(padded);
  }

  // The largest product in full is at least this; NaN counts for nothing.
  float least_of_all() const {
    vf least = vset(-kInfinity);
    int64_t column = 0;
    for (; column + W <= num_columns; column += W)
      least = vmax(vfnma(vset(error), vload(norms + column), vload(products + column)), least);
    float of_all = vmax_of(least);
    for (; column < num_columns; ++column) {
      const float low = products[column] - error * norms[column];
      of_all = low > of_all ? low : of_all;
    }
    return of_all;
  }

  Best best(const RowInFull& in_full) const {
    const vf least = vset(least_of_all());
    Best best;
    for (int64_t panel = 0; panel < num_panels(); ++panel) {
      bool any = false;
      for (int64_t c = 0; c < kPanel; c += W) any |= any_not_less(most(panel * kPanel + c), least);
      if (any) take_tile(best, in_full.panel(panel), panel * kPanel, columns_of(panel));
    }
    return best;
  }
};

// Finds the column with the largest sum of score and noise, by comparisons alone.
class Draw {
 public:
  Draw(const Rough& rough, const RowInFull& in_full, float best, float temperature, const Philox& philox)
      : rough_(rough), in_full_(in_full), best_(best), temperature_(temperature), philox_(philox) {
    win_with(kLowestNoise, INT64_MAX);  // the likeliest token alone has more
  }

  int64_t winner(int64_t likeliest) {
    take(likeliest / kPanel);  // mostly hard to beat
    for (int64_t panel = 0; panel < rough_.num_panels(); ++panel)
      if (may_win(panel)) take(panel);
    return column_;
  }

 private:
  OCTAVO_INLINE vf distance(vf logit) const { return vdiv(vsub(vset(best_), logit), vset(temperature_)); }

  void win_with(float value, int64_t column) {
    const float farthest = (kHighestNoise - value) * temperature_;
    value_ = value, column_ = column;
    hopeless_ = best_ - farthest - kRoundings * (farthest + std::fabs(best_));
  }

  // Whether a column may have as much as the winner so far. Its noise is bounded by what any has, and if that does not
  // settle it, closely.
  bool may_win(int64_t panel) const {
    for (int64_t first = panel * kPanel; first < (panel + 1) * kPanel; first += 2 * W) {
      const vf most[2] = {rough_.most(first), rough_.most(first + W)};
      if (!any_not_less(most[0], vset(hopeless_)) && !any_not_less(most[1], vset(hopeless_))) continue;
      vu32 words[2];
      philox_.columns(first / 4, words);
      for (int i = 0; i < 2; ++i)
        if (any_not_less(vsub(gumbel_bound(words[i]), distance(most[i])), vset(value_))) return true;
    }
    return false;
  }

  void take(int64_t panel) {
    const float* logits = in_full_.panel(panel);
    for (int64_t c = 0; c < kPanel; c += 2 * W) {
      vu32 words[2];
      philox_.columns((panel * kPanel + c) / 4, words);
      for (int i = 0; i < 2; ++i) {
        float values[W];
        vstore(values, vsub(gumbel(words[i]), distance(vload(logits + c + i * W))));
        for (int j = 0; j < W && c + i * W + j < rough_.columns_of(panel); ++j)
          take(values[j], panel * kPanel + c + i * W + j);
      }
    }
  }
  void take(float value, int64_t column) {
    if (value > value_ || (value == value_ && column < column_)) win_with(value, column);
  }

  const Rough& rough_;
  const RowInFull& in_full_;
  float best_, temperature_;
  const Philox& philox_;
  float value_;
  int64_t column_;
  float hopeless_;  // a smaller logit does not win with any noise
};

bool is_finite(float x) { return x - x == 0.0f; }

void draw_screened(const PackedSampleArgs& args, const Product& product, const Method& method, int64_t draw,
                   const Memory& memory) {
  const SampleTokensArgs& draws = args.draws;
  const int64_t row = draws.source_rows == nullptr ? draw : draws.source_rows[draw];
  const RowInFull in_full(product, method, row, memory);
  const Rough rough{draws.logits + row * draws.logits_stride, args.norms, draws.vocab_size,
                    screening_error(product.x + row * product.x_stride, product.in_features)};
  const Best best = rough.best(in_full);
  draws.best[draw] = best.value;
  draws.token_ids[draw] = 0;
  if (!is_finite(best.value)) return;
  draws.token_ids[draw] = best.index;
  if (draws.temperature[draw] == 0.0f) return;
  const Philox philox(draws.seeds[draw], draws.sequence_index[draw], draws.positions[draw]);
  draws.token_ids[draw] = Draw(rough, in_full, best.value, draws.temperature[draw], philox).winner(best.index);
}

}  // namespace

void packed_sample(const PackedSampleArgs& args, int64_t num_draws, Team& team) {
  PackedLinearArgs linear = args.linear;
  const bool screens = are_screened(args.norms, linear.format, args.num_rows);
  linear.int8_activations = screens;
  packed_linear(linear, args.num_rows, team);
  if (!screens) return sample_tokens(args.draws, num_draws, team);
  const Product product = product_of(linear, args.num_rows);
  const Method method = method_of(linear.format, false, product);
  const Memory memory(team, method, linear.in_features, kPanel * static_cast<int64_t>(sizeof(float)));
  team.parallel_for(num_draws, [&](int64_t draw) { draw_screened(args, product, method, draw, memory); });
}

}  // namespace octavo
