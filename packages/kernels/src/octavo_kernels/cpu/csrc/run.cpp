// The library's entry points: what it is, and the one call that runs ops, single or a recorded program of them.

#include <chrono>

#include "ops.h"
#include "pool.h"

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))

namespace octavo {
namespace {

constexpr int kAbiVersion = 9;

struct Job {
  const Op* ops;
  int64_t num_ops;
  const Step* step;  // null for ops that carry their own sizes
};

void run_op(const Op& op, const Step* step, Team& team) {
  const int64_t num_rows = step != nullptr && op.per_token ? step->num_tokens : op.num_rows;
  switch (static_cast<OpKind>(op.kind)) {
    case OpKind::kPackWeight:
      return pack_weight(*static_cast<const PackWeightArgs*>(op.args), team);
    case OpKind::kPackedLinear:
      return packed_linear(*static_cast<const PackedLinearArgs*>(op.args), num_rows, team);
    case OpKind::kPackedEmbedding:
      return packed_embedding(*static_cast<const PackedEmbeddingArgs*>(op.args), num_rows, team);
    case OpKind::kPackedArgmax:
      return packed_argmax(*static_cast<const PackedArgmaxArgs*>(op.args), num_rows, team);
    case OpKind::kRmsNorm:
      return rms_norm(*static_cast<const RmsNormArgs*>(op.args), num_rows, team);
    case OpKind::kGated:
      return gated(*static_cast<const GatedArgs*>(op.args), num_rows, team);
    case OpKind::kRopeKvWrite:
      return rope_kv_write(*static_cast<const RopeKvWriteArgs*>(op.args), num_rows, team);
    case OpKind::kPagedAttention: {
      const auto& args = *static_cast<const PagedAttentionArgs*>(op.args);
      return paged_attention(args, num_rows, step != nullptr && op.per_token ? step->num_seqs : args.num_seqs, team);
    }
    case OpKind::kNoise:
      return noise(*static_cast<const NoiseArgs*>(op.args), num_rows, team);
    case OpKind::kNoiseAt:
      return noise_at(*static_cast<const NoiseAtArgs*>(op.args), num_rows, team);
    case OpKind::kSampleTokens:
      return sample_tokens(*static_cast<const SampleTokensArgs*>(op.args), num_rows, team);
    case OpKind::kApplyTokenBitmask:
      return apply_token_bitmask(*static_cast<const ApplyTokenBitmaskArgs*>(op.args), num_rows, team);
    case OpKind::kLoraShrink:
      return lora_shrink(*static_cast<const LoraArgs*>(op.args), num_rows, team);
    case OpKind::kLoraExpand:
      return lora_expand(*static_cast<const LoraArgs*>(op.args), num_rows, team);
    case OpKind::kLoraLinear:
      return lora_linear(*static_cast<const LoraArgs*>(op.args), num_rows, team);
    case OpKind::kGroupRows:
      return group_rows(*static_cast<const GroupRowsArgs*>(op.args), num_rows, team);
    case OpKind::kPackedSample:
      return packed_sample(*static_cast<const PackedSampleArgs*>(op.args), num_rows, team);
  }
}

void run_job(Team& team, const void* argument) {
  const Job& job = *static_cast<const Job*>(argument);
  for (int64_t i = 0; i < job.num_ops; ++i) run_op(job.ops[i], job.step, team);
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT int octavo_abi_version(void) { return octavo::kAbiVersion; }

// The widest instruction set that this processor and system run: 0 baseline, 1 avx2, 2 avx512, 3 avx512vnni.
OCTAVO_EXPORT int octavo_cpu_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
  if (avx2) return 1;
#endif
  return 0;
}

// Runs ops one after the other on num_threads threads, this one included. Returns the nanoseconds it took.
OCTAVO_EXPORT int64_t octavo_run(const octavo::Op* ops, int64_t num_ops, const octavo::Step* step, int num_threads) {
  const auto started = std::chrono::steady_clock::now();
  const octavo::Job job{ops, num_ops, step};
  octavo::run_on_pool(num_threads, &octavo::run_job, &job);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started).count();
}
