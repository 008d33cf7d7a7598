// packed_linear and packed_argmax: products cut into tasks, and what becomes of their results.

#include "matmul.h"

#include <cstring>
#include <limits>

namespace octavo {
namespace {

constexpr int64_t kRowsOfTask = 128;    // a task's rows of x stay in L2 while panels go by
constexpr int64_t kRowsRoundedAlone = 4;  // so few are rounded by every thread for itself, which saves a loop
constexpr int64_t kTasksOfThread = 4;
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

// A product cut into tasks. One row is done so quickly that asking for work takes a thread as long as some panels: most of
// them are dealt out beforehand, in pairs, since two at once are multiplied by one row; the rest is small tasks, so that a
// thread that was held up does not hold up the others. Threads begin at both ends, so what is dealt lies there, and the
// rest between. With more rows every task is worth asking for, and there are so many that every thread gets as many
// panels, if that can be.
struct Cut {
  int64_t num_panels, num_dealt = 0, step, num_tasks = 1;  // tasks of one block of rows

  Cut(int64_t panels, int64_t num_rows, int64_t threads) : num_panels(panels), step(panels) {
    if (threads == 1) return;
    if (num_rows == 1) {
      num_dealt = num_panels * 3 / 4 / threads / 2 * 2;
      if (num_dealt > 0) num_first = (threads + 1) / 2, num_last = threads / 2;
      const int64_t rest = num_panels - num_dealt * threads;
      step = round_up(ceil_div(rest, 2 * threads), 2);
      num_tasks = num_first + ceil_div(rest, step) + num_last;
    } else {
      int64_t tasks_of_thread = kTasksOfThread;
      while (tasks_of_thread > 1 && num_panels % (tasks_of_thread * threads) != 0) --tasks_of_thread;
      step = ceil_div(num_panels, threads * (tasks_of_thread > 1 ? tasks_of_thread : kTasksOfThread));
      num_tasks = ceil_div(num_panels, step);
    }
  }
  void place(int64_t task, Part& part) const {
    part.first_panel = start(task);
    part.num_panels = start(task + 1) - part.first_panel;
  }

 private:
  int64_t num_first = 0, num_last = 0;  // tasks that are dealt, at each end

  int64_t start(int64_t task) const {
    if (task <= num_first) return task * num_dealt;
    if (task >= num_tasks - num_last) return num_panels - (num_tasks - task) * num_dealt;
    return num_first * num_dealt + (task - num_first) * step;
  }
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
  team.parallel_for(num_row_blocks * cut.num_tasks, [&](int64_t task) {
    Part part{};
    part.first_row = task / cut.num_tasks * rows_of_block;
    part.num_rows = min(rows_of_block, num_rows - part.first_row);
    if (part.num_rows <= 0) return;
    cut.place(task % cut.num_tasks, part);
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
                    min(step, num_panels - slice * step), nullptr, 0};
    argmax_part(args, product, part, method.part, memory.scratch, best + slice * num_rows + first_row);
  });
  team.parallel_for(num_rows, [&](int64_t row) {
    Best of_all = best[row];
    for (int64_t slice = 1; slice < num_slices; ++slice) of_all.take(best[slice * num_rows + row].value, best[slice * num_rows + row].index);
    args.ids[row] = of_all.index;
    args.best[row] = of_all.value;
  });
}

}  // namespace octavo
