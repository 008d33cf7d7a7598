// packed_argmax: where each row's product is largest. Products are not kept, and of many rows most are only screened.

#include <limits>

#include "largest.h"
#include "screen.h"

namespace octavo {
namespace {

constexpr int64_t kRowsOfTask = 128;  // a task's rows of x stay in L2 while panels go by
constexpr int64_t kNumSlices = 64;    // parts that the outputs are cut into, whatever the number of threads
constexpr int64_t kPanelsAtOnce = 2;
constexpr int64_t kTileBytes = kRowsOfTask * kPanelsAtOnce * kPanel * static_cast<int64_t>(sizeof(float));
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The outputs cut into slices, each of which is a task for some rows.
struct Slices {
  int64_t num_panels, step, num_slices, num_row_blocks, num_rows;

  Slices(int64_t out_features, int64_t rows)
      : num_panels(ceil_div(out_features, kPanel)),
        step(ceil_div(num_panels, kNumSlices)),
        num_slices(ceil_div(num_panels, step)),
        num_row_blocks(ceil_div(rows, kRowsOfTask)),
        num_rows(rows) {}

  int64_t num_tasks() const { return num_slices * num_row_blocks; }
  int64_t slice_of(int64_t task) const { return task % num_slices; }
  int64_t first_row_of(int64_t task) const { return task / num_slices * kRowsOfTask; }

  // Computes the products of a task, a few panels at a time: use(part, products in part.out).
  template <class Use>
  void each_part(int64_t task, const Product& product, PartFunction compute, uint8_t* scratch, Use&& use) const {
    const int64_t first_row = first_row_of(task), first_panel = slice_of(task) * step;
    const int64_t stop = min(first_panel + step, num_panels);
    Part part{first_row, min(kRowsOfTask, num_rows - first_row), 0, 0, 0,
              reinterpret_cast<float*>(scratch + kScratchBytes), kPanelsAtOnce * kPanel};
    for (int64_t panel = first_panel; panel < stop; panel += kPanelsAtOnce) {
      part.first_panel = panel;
      part.num_panels = min(kPanelsAtOnce, stop - panel);
      part.next_panel = panel + kPanelsAtOnce;
      compute(product, part, scratch);
      use(part);
    }
  }
};

// ---- every product in full ------------------------------------------------------------------------------------------

void argmax_of_all(const PackedArgmaxArgs& args, Product product, const Method& method, Team& team) {
  const Slices slices(args.out_features, product.num_rows);
  const Memory memory(team, method, args.in_features, kTileBytes);
  auto* best = static_cast<Best*>(args.workspace);  // [num_slices, rows]
  auto* workspace = static_cast<uint8_t*>(args.workspace) + round_up(kNumSlices * product.num_rows * sizeof(Best), 64);
  product.rounded = round_all(method, product, workspace, memory.rounded, team);
  team.parallel_for(slices.num_tasks(), [&](int64_t task) {
    Best* of_rows = best + slices.slice_of(task) * product.num_rows + slices.first_row_of(task);
    for (int64_t row = 0; row < min(kRowsOfTask, product.num_rows - slices.first_row_of(task)); ++row) of_rows[row] = {};
    slices.each_part(task, product, method.part, memory.scratch, [&](const Part& part) {
      const int64_t column = part.first_panel * kPanel;
      for (int64_t row = 0; row < part.num_rows; ++row)
        take_tile(of_rows[row], part.out + row * part.out_stride, column,
                  min(part.num_panels * kPanel, args.out_features - column));
    });
  });
  team.parallel_for(product.num_rows, [&](int64_t row) {
    Best of_all = best[row];
    for (int64_t slice = 1; slice < slices.num_slices; ++slice) {
      const Best& other = best[slice * product.num_rows + row];
      of_all.take(other.value, other.index);
    }
    args.ids[row] = of_all.index;
    args.best[row] = of_all.value;
  });
}

// ---- screened -------------------------------------------------------------------------------------------------------

// What is known of the products after screening. All threads see it.
struct Screened {
  float* errors;  // [rows], of weights of norm 1
  float* least;   // [num_slices, rows]: a product of the slice, or of others that its thread has seen, is as large
  float* most;    // [rows, num_panels]: no product of the panel is larger; -infinity if that is less than what `least` says
  uint8_t* rounded;

  Screened(void* workspace, int64_t num_rows, int64_t num_panels)
      : errors(static_cast<float*>(workspace)),
        least(errors + num_rows),
        most(least + kNumSlices * num_rows),
        rounded(static_cast<uint8_t*>(workspace) +
                round_up((1 + kNumSlices + num_panels) * num_rows * static_cast<int64_t>(sizeof(float)), 64)) {}
};

// Looks at the products of a row and a panel. Returns the least that the largest of all is known to be.
float screen_panel(const float* products, const float* norms, int64_t num_columns, float error, float least, float& most) {
  const auto may_be_largest = [&](int64_t c) OCTAVO_INLINE_LAMBDA {
    return any_not_less(vfma(vset(error), vload(norms + c), vload(products + c)), vset(least));
  };
  bool any = num_columns < kPanel;
  for (int64_t c = 0; c + W <= num_columns; c += W) any |= may_be_largest(c);
  most = -kInfinity;
  if (!any) return least;
  for (int64_t c = 0; c < num_columns; ++c) {
    const float high = products[c] + error * norms[c], low = products[c] - error * norms[c];
    if (!(high <= most)) most = high == high ? high : kInfinity;
    if (low > least) least = low;
  }
  return least;
}

// Rounds sixteen rows to one digit.
void round_for_screening(const Product& product, const Method& method, int64_t first_row, const Screened& screened) {
  const int64_t num_rows = min(16, product.num_rows - first_row);
  round_some(method, product, first_row, num_rows, screened.rounded);
  for (int64_t row = first_row; row < first_row + num_rows; ++row)
    screened.errors[row] = screening_error(product.x + row * product.x_stride, product.in_features);
}

// The largest of a row's products, of those that may be.
Best largest_of(const PackedArgmaxArgs& args, const Product& product, const Method& method, int64_t row,
                const Slices& slices, const Screened& screened, const Memory& memory) {
  const float* most = screened.most + row * slices.num_panels;
  float least = -kInfinity;
  for (int64_t slice = 0; slice < slices.num_slices; ++slice) {
    const float of_slice = screened.least[slice * product.num_rows + row];
    least = of_slice > least ? of_slice : least;
  }
  const RowInFull in_full(product, method, row, memory);
  Best best;
  for (int64_t panel = 0; panel < slices.num_panels; ++panel) {
    if (most[panel] < least || most[panel] < best.value) continue;
    take_tile(best, in_full.panel(panel), panel * kPanel, min(kPanel, args.out_features - panel * kPanel));
  }
  return best;
}

void argmax_by_screening(const PackedArgmaxArgs& args, const Product& product, const Method& method, Team& team) {
  const Slices slices(args.out_features, product.num_rows);
  const Method rough = method_of(args.format, true, product);
  const Memory memory(team, method, args.in_features, kTileBytes + product.num_rows * static_cast<int64_t>(sizeof(float)));
  const Screened screened(args.workspace, product.num_rows, slices.num_panels);
  auto* seen = reinterpret_cast<float*>(memory.scratch + kScratchBytes + kTileBytes);  // [rows], by this thread
  for (int64_t row = 0; row < product.num_rows; ++row) seen[row] = -kInfinity;
  team.parallel_for(ceil_div(product.num_rows, 16),
                    [&](int64_t task) { round_for_screening(product, rough, task * 16, screened); });
  Product rounded = product;
  rounded.rounded = screened.rounded;
  team.parallel_for(slices.num_tasks(), [&](int64_t task) {
    const int64_t first_row = slices.first_row_of(task);
    slices.each_part(task, rounded, rough.part, memory.scratch, [&](const Part& part) {
      for (int64_t row = 0; row < part.num_rows; ++row)
        for (int64_t p = 0; p < part.num_panels; ++p) {
          const int64_t panel = part.first_panel + p, column = panel * kPanel;
          seen[first_row + row] = screen_panel(part.out + row * part.out_stride + p * kPanel, args.norms + column,
                                               min(kPanel, args.out_features - column), screened.errors[first_row + row],
                                               seen[first_row + row],
                                               screened.most[(first_row + row) * slices.num_panels + panel]);
        }
    });
    float* least = screened.least + slices.slice_of(task) * product.num_rows;
    for (int64_t row = first_row; row < min(first_row + kRowsOfTask, product.num_rows); ++row) least[row] = seen[row];
  });
  team.parallel_for(product.num_rows, [&](int64_t row) {
    const Best best = largest_of(args, product, method, row, slices, screened, memory);
    args.ids[row] = best.index;
    args.best[row] = best.value;
  });
}

}  // namespace

void packed_argmax(const PackedArgmaxArgs& args, int64_t num_rows, Team& team) {
  const Product product = product_of(args, num_rows);
  const Method method = method_of(args.format, args.int8_activations, product);
  if (!args.int8_activations && are_screened(args.norms, args.format, num_rows))
    return argmax_by_screening(args, product, method, team);
  argmax_of_all(args, product, method, team);
}

}  // namespace octavo
