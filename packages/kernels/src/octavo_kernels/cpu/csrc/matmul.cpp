// packed_linear and packed_argmax: products cut into tasks, and what becomes of their results.

#include "matmul.h"

#include <cstring>
#include <limits>

namespace octavo {
namespace {

constexpr int64_t kRowsOfTask = 128;    // a task's rows of x stay in L2 while panels go by
constexpr int64_t kRowsRoundedAlone = 4;  // so few are rounded by every thread for itself, which saves a loop
constexpr int64_t kNumSlices = 64;      // parts that an arg-max is cut into, whatever the number of threads

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// How a product is computed, and the bytes of a rounded row.
Method method_of(int64_t format, bool int8_activations, const Product& product) {
  if (is_grouped(format)) return grouped_method(product);
  if (has_planes(format)) return planes_method(int8_activations);
  if (int8_activations) return int8_method(format);
  return fixed_is_faster(format) ? fixed_method(format) : fma_method(format);
}
int64_t bytes_of_rows(const Method& method, int64_t num_rows, int64_t in_features) {
  return num_rows * ceil_div(in_features, kGroup) * method.bytes_of_group;
}

// Rounds the rows of x as a method wants; returns on all threads when they can be read. `own` is the thread's memory for
// few rows.
const void* round_all(const Method& method, const Product& product, void* workspace, void* own, Team& team) {
  if (method.round == nullptr && method.prepare == nullptr) return nullptr;
  const auto round = [&](int64_t first_row, int64_t num_rows, void* out) {
    if (method.prepare != nullptr) return method.prepare(product, first_row, num_rows, out);
    method.round(product.x, product.x_stride, product.in_features, first_row, num_rows, out);
  };
  if (product.num_rows <= kRowsRoundedAlone) {
    round(0, product.num_rows, own);
    return own;
  }
  const int64_t step = product.num_rows < 16 ? 8 : 16;  // sixteen lie together where they are multiplied in tiles
  team.parallel_for(ceil_div(product.num_rows, step),
                    [&](int64_t task) { round(task * step, min(step, product.num_rows - task * step), workspace); });
  return workspace;
}

// The panels of a product cut into tasks for threads that begin at both ends: large ones there, since asking for work
// takes a thread as long as some panels by one row, and ever smaller ones towards the middle, where threads end, so that one
// that was held up does not hold up the others. One row takes panels in pairs, since it multiplies two at once.
class Cut {
 public:
  Cut(int64_t num_panels, int64_t num_rows, int64_t num_threads)
      : num_panels_(num_panels), num_first_((num_threads + 1) / 2), num_last_(num_threads / 2) {
    const int64_t grain = num_rows == 1 ? 2 : 1;
    int64_t rest = num_panels;
    while (num_threads > 1 && num_rounds_ < kMaxRounds) {
      const int64_t size = (num_rows == 1 ? 3 * rest / 4 : rest / 2) / num_threads / grain * grain;
      if (size == 0) break;
      rest -= size * num_threads;
      start_[num_rounds_ + 1] = start_[num_rounds_] + size;
      ++num_rounds_;
    }
    middle_step_ = num_threads == 1 ? num_panels : grain;
    num_tasks_ = num_rounds_ * num_threads + ceil_div(rest, middle_step_);
  }

  int64_t num_tasks() const { return num_tasks_; }

  // Panels before a task. At each end the threads of that end get one task of a round each, of the same size.
  int64_t start(int64_t task) const {
    const int64_t middle = num_rounds_ * num_first_, back = num_tasks_ - task;
    if (task <= middle) return in_rounds(task, num_first_);
    if (back <= num_rounds_ * num_last_) return num_panels_ - in_rounds(back, num_last_);
    return in_rounds(middle, num_first_) + (task - middle) * middle_step_;
  }

 private:
  static constexpr int kMaxRounds = 16;

  int64_t in_rounds(int64_t num_tasks, int64_t num_threads) const {
    if (num_tasks == 0) return 0;
    const int64_t round = num_tasks / num_threads, begun = num_tasks % num_threads;
    return start_[round] * num_threads + (begun > 0 ? begun * (start_[round + 1] - start_[round]) : 0);
  }

  int64_t num_panels_, num_first_, num_last_, middle_step_, num_tasks_;
  int64_t num_rounds_ = 0;
  int64_t start_[kMaxRounds + 1] = {};  // panels of a thread before a round
};

struct Memory {  // what a thread needs for a product
  uint8_t* scratch;
  void* rounded;

  Memory(Team& team, const Method& method, int64_t in_features, int64_t extra) {
    const int64_t rounded_bytes = round_up(bytes_of_rows(method, kRowsRoundedAlone, in_features), 64);
    rounded = team.scratch(rounded_bytes + kScratchBytes + extra);
    scratch = static_cast<uint8_t*>(rounded) + rounded_bytes;
  }
};

void finish_columns(const PackedLinearArgs& args, const Part& part, int64_t first_column, int64_t num_columns) {
  if (args.bias == nullptr) return;
  for (int64_t row = 0; row < part.num_rows; ++row) {
    float* out = args.out + (part.first_row + row) * args.out_stride + first_column;
    for (int64_t c = 0; c < num_columns; ++c) out[c] += args.bias[first_column + c];
  }
}

void linear_part(const PackedLinearArgs& args, const Product& product, Part part, PartFunction compute,
                 uint8_t* scratch) {
  const int64_t first_column = part.first_panel * kPanel;
  const int64_t num_columns = min(part.num_panels * kPanel, args.out_features - first_column);
  const int64_t num_whole = num_columns / kPanel;
  const int64_t num_panels = part.num_panels;
  part.out = args.out + part.first_row * args.out_stride + first_column;
  part.out_stride = args.out_stride;
  part.num_panels = num_whole;
  if (num_whole > 0) compute(product, part, scratch);
  if (num_whole < num_panels) {  // the last panel has columns that out has not
    float* tile = reinterpret_cast<float*>(scratch + kScratchBytes);
    Part last = part;
    last.first_panel += num_whole;
    last.num_panels = 1;
    last.out = tile;
    last.out_stride = kPanel;
    compute(product, last, scratch);
    for (int64_t row = 0; row < part.num_rows; ++row)
      std::memcpy(part.out + row * args.out_stride + num_whole * kPanel, tile + row * kPanel,
                  (num_columns - num_whole * kPanel) * sizeof(float));
  }
  finish_columns(args, part, first_column, num_columns);
}

// The larger of two candidates; of equal ones the lower index, and NaN is larger than any number.
struct Best {
  float value;
  int32_t unused;
  int64_t index;

  void take(float other, int64_t other_index) {
    const bool nan = value != value, other_nan = other != other;
    const bool larger = other_nan ? !nan : (!nan && other > value);
    const bool equal = other_nan ? nan : other == value;
    if (larger || (equal && other_index < index)) value = other, index = other_index;
  }
};

void take_tile(Best& best, const float* tile, int64_t first_index, int64_t num_columns) {
  vf largest = vload(tile);
  vf nan_if_any = vsub(largest, largest);
  for (int64_t c = W; c + W <= num_columns; c += W) {
    const vf values = vload(tile + c);
    largest = vmax(largest, values);
    nan_if_any = vadd(nan_if_any, vsub(values, values));
  }
  const bool finite = vsum(nan_if_any) == 0.0f && num_columns % W == 0;
  if (finite && vmax_of(largest) < best.value) return;  // mostly: nothing here is as large
  for (int64_t c = 0; c < num_columns; ++c) best.take(tile[c], first_index + c);
}

void argmax_part(const PackedArgmaxArgs& args, const Product& product, Part part, PartFunction compute,
                 uint8_t* scratch, Best* best) {
  auto* tile = reinterpret_cast<float*>(scratch + kScratchBytes);
  for (int64_t row = 0; row < part.num_rows; ++row) best[row] = {-std::numeric_limits<float>::infinity(), 0, INT64_MAX};
  const int64_t stop = part.first_panel + part.num_panels;
  for (int64_t panel = part.first_panel; panel < stop; panel += 2) {
    part.first_panel = panel;
    part.num_panels = min(2, stop - panel);
    part.next_panel = panel + 2;
    part.out = tile;
    part.out_stride = 2 * kPanel;
    compute(product, part, scratch);
    const int64_t num_columns = min(part.num_panels * kPanel, args.out_features - panel * kPanel);
    for (int64_t row = 0; row < part.num_rows; ++row)
      take_tile(best[row], tile + row * part.out_stride, panel * kPanel, num_columns);
  }
}

}  // namespace

void packed_linear(const PackedLinearArgs& args, int64_t num_rows, Team& team) {
  Product product{args.x, static_cast<const uint8_t*>(args.weight), args.x_stride, num_rows, args.in_features, nullptr};
  if (has_planes(args.format)) product.planes = &plane_format(args.format);
  product.grid = static_cast<const uint8_t*>(args.grid);
  const int64_t num_row_blocks = ceil_div(num_rows, kRowsOfTask);
  const int64_t rows_of_block = num_rows > 0 ? round_up(ceil_div(num_rows, num_row_blocks), 16) : 0;
  const Method method = method_of(args.format, args.int8_activations, product);
  const Memory memory(team, method, args.in_features, kRowsOfTask * kPanel * static_cast<int64_t>(sizeof(float)));
  product.rounded = round_all(method, product, args.workspace, memory.rounded, team);
  const Cut cut(ceil_div(args.out_features, kPanel), num_rows, team.num_threads());
  const int64_t num_tasks = num_row_blocks * cut.num_tasks();
  team.parallel_for(num_tasks, [&](int64_t task) {
    Part part{};
    part.first_row = task % num_row_blocks * rows_of_block;
    part.num_rows = min(rows_of_block, num_rows - part.first_row);
    if (part.num_rows <= 0) return;
    part.first_panel = cut.start(task / num_row_blocks);
    part.num_panels = cut.start(task / num_row_blocks + 1) - part.first_panel;
    const int64_t after = team.task_after(task);
    const bool more = after >= 0 && after < num_tasks;
    part.next_panel = more ? cut.start(after / num_row_blocks) : part.first_panel + part.num_panels;
    linear_part(args, product, part, method.part, memory.scratch);
  });
}

void packed_argmax(const PackedArgmaxArgs& args, int64_t num_rows, Team& team) {
  Product product{args.x, static_cast<const uint8_t*>(args.weight), args.x_stride, num_rows, args.in_features, nullptr};
  if (has_planes(args.format)) product.planes = &plane_format(args.format);
  product.grid = static_cast<const uint8_t*>(args.grid);
  const Method method = method_of(args.format, args.int8_activations, product);
  const Memory memory(team, method, args.in_features, kRowsOfTask * 2 * kPanel * static_cast<int64_t>(sizeof(float)));
  auto* best = static_cast<Best*>(args.workspace);  // [num_slices, rows]
  auto* workspace = static_cast<uint8_t*>(args.workspace) + round_up(kNumSlices * num_rows * sizeof(Best), 64);
  product.rounded = round_all(method, product, workspace, memory.rounded, team);
  const int64_t num_panels = ceil_div(args.out_features, kPanel);
  const int64_t step = ceil_div(num_panels, kNumSlices);
  const int64_t num_slices = ceil_div(num_panels, step), num_row_blocks = ceil_div(num_rows, kRowsOfTask);
  team.parallel_for(num_slices * num_row_blocks, [&](int64_t task) {
    const int64_t slice = task % num_slices, first_row = task / num_slices * kRowsOfTask;
    const Part part{first_row, min(kRowsOfTask, num_rows - first_row), slice * step,
                    min(step, num_panels - slice * step), (slice + 1) * step, nullptr, 0};
    argmax_part(args, product, part, method.part, memory.scratch, best + slice * num_rows + first_row);
  });
  team.parallel_for(num_rows, [&](int64_t row) {
    Best of_all = best[row];
    for (int64_t slice = 1; slice < num_slices; ++slice) {
      const Best& other = best[slice * num_rows + row];
      of_all.take(other.value, other.index);
    }
    args.ids[row] = of_all.index;
    args.best[row] = of_all.value;
  });
}

}  // namespace octavo
