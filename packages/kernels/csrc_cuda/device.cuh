// What kernels ask of the hardware beyond C++: copies that run aside, products of small matrices, exchange in a warp.
//
// Tests that run kernels on the host bring their own of these: all the rest of a kernel is the same code there.

#pragma once

#include <cstdint>

namespace octavo_cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Begins to copy 16 or 4 bytes to shared memory, or zeros where nothing is present; `from` is then not read.
template <int kBytes>
__device__ __forceinline__ void copy_aside(void* to, const void* from, bool present) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int num_read = present ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first cache: no thread block reads it again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(num_read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(kBytes), "r"(num_read)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are not there yet; other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T>
__device__ __forceinline__ T from_lane(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <typename T>
__device__ __forceinline__ T from_lane_across(T value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// The number of lanes in which a condition holds.
__device__ __forceinline__ int count_lanes(bool holds) { return __popc(__ballot_sync(0xffffffffu, holds)); }

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Two numbers in one word, the first one in its lower half, rounded half to even.
__device__ __forceinline__ uint32_t pair_of(float first, float second, Bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t pair_of(float first, float second, Fp16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// The bytes that the digits of `order` name, least digit first: 0 to 3 of a, 4 to 7 of b.
__device__ __forceinline__ uint32_t take_bytes(uint32_t a, uint32_t b, uint32_t order) {
  return __byte_perm(a, b, order);
}

// c [16, 8] += a [16, 16] b [16, 8], dealt out to a warp as PTX has it for mma.m16n8k16: lane 4g + t holds
//   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), pairs of columns
//   b: (2t.., g), (2t + 8.., g), pairs of rows
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace octavo_cuda
