// packed_linear: products cut into tasks.

#include <cstring>

#include "matmul_inputs.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int64_t kRowsOfTask = 128;  // a task's rows of x stay in L2 while panels go by
constexpr int64_t kStreamedBytes = 4 << 20;  // of an output that the caches would not keep
constexpr int64_t kFirstBytes = 8192;  // of its first weights that a thread asks for while rows are rounded

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

void finish_columns(const PackedLinearArgs& args, const Part& part, int64_t first_column, int64_t num_columns) {
  if (args.bias == nullptr) return;
  for (int64_t row = 0; row < part.num_rows; ++row) {
    float* out = args.out + (part.first_row + row) * args.out_stride + first_column;
    for (int64_t c = 0; c < num_columns; ++c) out[c] += args.bias[first_column + c];
  }
}

// Whether outputs may be written past the caches. Those that a bias is added to are not.
bool streams(const PackedLinearArgs& args, int64_t num_rows) {
  constexpr int64_t kAligned = 64 / sizeof(float);
  const bool aligned = reinterpret_cast<uintptr_t>(args.out) % 64 == 0 && args.out_stride % kAligned == 0;
  const int64_t num_bytes = num_rows * args.out_features * static_cast<int64_t>(sizeof(float));
  return aligned && args.bias == nullptr && num_bytes >= kStreamedBytes;
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
    last.streams = false;
    compute(product, last, scratch);
    for (int64_t row = 0; row < part.num_rows; ++row)
      std::memcpy(part.out + row * args.out_stride + num_whole * kPanel, tile + row * kPanel,
                  (num_columns - num_whole * kPanel) * sizeof(float));
  }
  finish_columns(args, part, first_column, num_columns);
}

}  // namespace

void packed_linear(const PackedLinearArgs& args, int64_t num_rows, Team& team) {
  Product product = product_of(args, num_rows);
  const int64_t num_row_blocks = ceil_div(num_rows, kRowsOfTask);
  const int64_t rows_of_block = num_rows > 0 ? round_up(ceil_div(num_rows, num_row_blocks), 16) : 0;
  const Method method = method_of(args.format, args.int8_activations, product);
  const Memory memory(team, method, args.in_features, kRowsOfTask * kPanel * static_cast<int64_t>(sizeof(float)));
  const Cut cut(ceil_div(args.out_features, kPanel), num_rows, team.num_threads());
  const bool stream = streams(args, num_rows);
  const int64_t num_tasks = num_row_blocks * cut.num_tasks(), first_task = team.first_task(num_tasks);
  if (first_task >= 0 && first_task < num_tasks)
    prefetch_to_second(panel_of(product, args.format, cut.start(first_task / num_row_blocks)), kFirstBytes);
  product.rounded = round_all(method, product, args.workspace, memory.rounded, team);
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
    part.streams = stream;
    linear_part(args, product, part, method.part, memory.scratch);
    if (stream) vfence();
  });
}

}  // namespace octavo
