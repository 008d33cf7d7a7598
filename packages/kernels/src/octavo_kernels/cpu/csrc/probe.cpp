// What this machine can do at best, measured with the library's own threads: the bounds that kernels are held against.

#include <chrono>
#include <cstdlib>

#include "pool.h"
#include "vec.h"

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))

namespace octavo {
namespace {

constexpr int64_t kBytesOfTask = 1 << 20;
constexpr int64_t kNumRounds = 1 << 22;
constexpr int kNumChains = 12;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Read {
  const float* memory;
  int64_t num_tasks;
  float* sums;  // one per task, so that the reads have a use
};

void read_all(Team& team, const void* argument) {
  const Read& read = *static_cast<const Read*>(argument);
  team.parallel_for(read.num_tasks, [&](int64_t task) {
    const float* part = read.memory + task * (kBytesOfTask / 4);
    vf sums[8];
    for (vf& sum : sums) sum = vzero();
    for (int64_t i = 0; i < kBytesOfTask / 4; i += 8 * W)
      for (int j = 0; j < 8; ++j) sums[j] = vadd(sums[j], vload(part + i + j * W));
    for (int j = 1; j < 8; ++j) sums[0] = vadd(sums[0], sums[j]);
    read.sums[task] = vsum(sums[0]);
  });
}

#if defined(__AVX512VNNI__)
void multiply_bytes(Team& team, const void*) {
  team.parallel_for(team.num_threads(), [](int64_t) {
    __m512i sums[kNumChains] = {};
    const __m512i codes = _mm512_set1_epi32(0x01020304), x = _mm512_set1_epi32(0x01010101);
    for (int64_t round = 0; round < kNumRounds; ++round)
#pragma GCC unroll 12
      for (int i = 0; i < kNumChains; ++i)  // the compiler may not see that nobody needs the sums
        __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(codes), "v"(x));
  });
}
#endif

}  // namespace
}  // namespace octavo

// Bytes per second at which num_threads threads read num_bytes of memory one after the other, the best of some passes.
OCTAVO_EXPORT double octavo_read_bandwidth(int64_t num_bytes, int num_threads) {
  using namespace octavo;
  const int64_t num_tasks = num_bytes / kBytesOfTask > 0 ? num_bytes / kBytesOfTask : 1;
  auto* memory = static_cast<float*>(std::calloc(num_tasks, kBytesOfTask));
  auto* sums = static_cast<float*>(std::calloc(num_tasks, sizeof(float)));
  double best = 0;
  if (memory != nullptr && sums != nullptr) {
    for (int64_t i = 0; i < num_tasks * (kBytesOfTask / 4); i += 1024) memory[i] = 1.0f;  // pages exist once written
    const Read read{memory, num_tasks, sums};
    for (int pass = 0; pass < 5; ++pass) {
      const double started = seconds();
      run_on_pool(num_threads, &read_all, &read);
      const double rate = static_cast<double>(num_tasks * kBytesOfTask) / (seconds() - started);
      best = rate > best ? rate : best;
    }
  }
  std::free(sums);
  std::free(memory);
  return best;
}

// Operations per second (a product and a sum are two) of AVX-512 VNNI on num_threads threads; 0 without it.
OCTAVO_EXPORT double octavo_vnni_peak(int num_threads) {
  double best = 0;
#if defined(__AVX512VNNI__)
  using namespace octavo;
  for (int pass = 0; pass < 5; ++pass) {
    const double started = seconds();
    run_on_pool(num_threads, &multiply_bytes, nullptr);
    const double rate = 128.0 * kNumChains * kNumRounds * num_threads / (seconds() - started);
    best = rate > best ? rate : best;
  }
#else
  (void)num_threads;
#endif
  return best;
}
