// csrc_cuda/device.cuh on the host: the threads of a block take turns as fibers, in an order drawn from a seed.
//
// It is stricter than a GPU where that finds mistakes: a copy aside leaves NaN in its place until its own thread has
// waited for it, a thread and then a warp runs on past others until it has to wait for them, and threads that wait for
// each other in vain end the process. Left out is what only a GPU can show: the launch, and the memory model but for barriers.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static Dim gridDim, blockDim, blockIdx, threadIdx;

using std::max;
using std::min;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace octavo_cuda {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "kernel on the host: %s\n", what);
  std::abort();
}

struct Barrier {
  unsigned expected, arrived = 0, generation = 0;
};

struct Copy {
  char* to;
  const char* from;
  int num_bytes;
  bool present;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done = false;
  const Barrier* waits_at = nullptr;
  unsigned generation = 0;  // of the barrier, when it came there
  unsigned num_exchanges = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;

  bool can_run() const { return !done && (waits_at == nullptr || waits_at->generation != generation); }
};

struct Warp {
  Barrier barrier{32};
  unsigned char slots[2][32][32];  // of two exchanges in turn: none is overwritten before all have read it
};

struct Block {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barrier{0};
  std::vector<uint4> shared;
  std::function<void()> kernel;
  unsigned current = 0;
};
static Block* block;

inline void enter() {
  block->kernel();
  block->threads[block->current]->done = true;
}

inline void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Thread& thread = *block->threads[block->current];
  thread.waits_at = &barrier;
  thread.generation = barrier.generation;
  swapcontext(&thread.context, &block->scheduler);
  thread.waits_at = nullptr;
}

// Runs the threads of a warp until each is at its end or waits for other warps; says whether any has run.
inline bool run_warp(unsigned warp, std::mt19937& chance) {
  unsigned lanes[32];
  std::iota(lanes, lanes + 32, 32 * warp);
  bool has_run = false, moved = true;
  while (moved) {
    moved = false;
    std::shuffle(lanes, lanes + 32, chance);
    for (const unsigned index : lanes) {
      Thread& thread = *block->threads[index];
      if (!thread.can_run()) continue;
      block->current = index;
      threadIdx = {index, 0, 0};
      swapcontext(&block->scheduler, &thread.context);
      has_run = moved = true;
    }
  }
  return has_run;
}

inline void prepare(Thread& thread) {
  thread.done = false;
  thread.waits_at = nullptr;
  thread.num_exchanges = 0;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = &block->scheduler;
  makecontext(&thread.context, enter, 0);
}

// Runs one thread block to its end.
inline void run_block(unsigned num_threads, size_t num_bytes, const std::function<void()>& kernel, std::mt19937& chance) {
  constexpr uint32_t kGuard = 0xA5A5A5A5;
  static std::vector<std::unique_ptr<Thread>> kept;  // their stacks are not made anew
  Block own;
  block = &own;
  own.kernel = kernel;
  own.barrier.expected = num_threads;
  own.warps.resize(num_threads / 32);
  own.shared.assign(num_bytes / 16 + 4, uint4{~0U, ~0U, ~0U, ~0U});
  for (size_t i = num_bytes / 16; i < own.shared.size(); ++i) own.shared[i] = {kGuard, kGuard, kGuard, kGuard};
  kept.resize(std::min<size_t>(kept.size(), num_threads));
  while (kept.size() < num_threads) kept.push_back(std::make_unique<Thread>());
  own.threads.swap(kept);
  for (auto& thread : own.threads) prepare(*thread);
  std::vector<unsigned> warps(own.warps.size());
  std::iota(warps.begin(), warps.end(), 0U);
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(warps.begin(), warps.end(), chance);
    for (const unsigned warp : warps) moved = run_warp(warp, chance) || moved;
  }
  for (unsigned i = 0; i < num_threads; ++i) {
    if (!own.threads[i]->done) fail("threads wait for each other in vain");
    for (const auto& group : own.threads[i]->groups) {
      if (!group.empty()) fail("a thread ended before its copies were there");
    }
    own.threads[i]->groups.clear();
    if (!own.threads[i]->open.empty()) fail("a thread ended with copies in no group");
  }
  for (size_t i = num_bytes / 16; i < own.shared.size(); ++i) {
    if (own.shared[i].x != kGuard || own.shared[i].w != kGuard) fail("more shared memory was written than there is");
  }
  own.threads.swap(kept);
}

inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
inline char* shared_memory() { return reinterpret_cast<char*>(block->shared.data()); }
inline Warp& own_warp() { return block->warps[threadIdx.x / 32]; }
inline void sync_block() { wait_at(block->barrier); }
inline void sync_warp() { wait_at(own_warp().barrier); }

inline void finish_copies(size_t num_pending) {
  auto& groups = block->threads[block->current]->groups;
  for (; groups.size() > num_pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.present) {
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.num_bytes));
      } else {
        std::memset(copy.to, 0, static_cast<size_t>(copy.num_bytes));
      }
    }
  }
}

template <int kBytes>
void copy_aside(void* to, const void* from, bool present) {
  const uint64_t bits = reinterpret_cast<uint64_t>(to) | (present ? reinterpret_cast<uint64_t>(from) : 0);
  if (bits % kBytes != 0) fail("a copy begins at no multiple of its size");
  std::memset(to, 0xFF, kBytes);  // NaN in every floating format
  block->threads[block->current]->open.push_back({static_cast<char*>(to), static_cast<const char*>(from), kBytes, present});
}

inline void end_group() {
  Thread& thread = *block->threads[block->current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int kPending>
void wait_for_groups() {
  finish_copies(kPending);
}

// Shows a value to the warp and returns those of all lanes, which stay until the next exchange but one.
template <typename T>
const unsigned char (&exchange(const T& value))[32][32] {
  static_assert(sizeof(T) <= 32, "a slot has 32 bytes");
  Warp& warp = own_warp();
  auto& slots = warp.slots[block->threads[block->current]->num_exchanges++ % 2];
  std::memcpy(slots[lane_id()], &value, sizeof(T));
  wait_at(warp.barrier);
  return slots;
}

template <typename T>
T from_lane(T value, int lane) {
  const auto& slots = exchange(value);
  std::memcpy(&value, slots[lane & 31], sizeof(T));
  return value;
}

template <typename T>
T from_lane_across(T value, int distance) {
  return from_lane(value, lane_id() ^ distance);
}

inline int count_lanes(bool holds) {
  const auto& slots = exchange(static_cast<unsigned char>(holds));
  int count = 0;
  for (const auto& slot : slots) count += slot[0];
  return count;
}

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float wide(uint16_t bits, Bf16) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
inline float wide(uint16_t bits, Fp16) {
  const float magnitude = (bits & 0x7C00) == 0x7C00 ? ((bits & 0x3FF) != 0 ? NAN : INFINITY)
                                                    : __uint_as_float((bits & 0x7FFFU) << 13) * 0x1p112f;
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline uint16_t rounded(float value, Bf16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t rounded(float value, Fp16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7FFF;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)));
  bits &= 0x7FFFFFFF;
  return static_cast<uint16_t>(sign | (((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - (112U << 10)));
}

template <typename T>
uint32_t pair_of(float first, float second, T type) {
  return rounded(first, type) | static_cast<uint32_t>(rounded(second, type)) << 16;
}

inline uint32_t take_bytes(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t taken = 0;
  for (int i = 0; i < 4; ++i) {
    taken |= static_cast<uint32_t>(bytes >> (order >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
  }
  return taken;
}

// As PTX ISA has it for mma.m16n8k16 (section 9.7.14): which lane holds which element of a, b and c.
template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto& slots = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [&](uint32_t pair, int index) { return wide(static_cast<uint16_t>(pair >> (16 * (index % 2))), type); };
  const auto of = [&](int lane) {
    Operands operands;
    std::memcpy(&operands, slots[lane], sizeof(operands));
    return operands;
  };
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
      const uint32_t right = of(column * 4 + k % 8 / 2).b[k / 8];
      sum += static_cast<double>(half(left, k)) * half(right, k);
    }
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace octavo_cuda
