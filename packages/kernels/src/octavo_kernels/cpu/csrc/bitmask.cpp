// apply_token_bitmask: logits of tokens whose bit is 0 become -inf. Words of 32 tokens are mostly all 1 or all 0.

#include <limits>

#include "ops.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int64_t kTokensOfWord = 32;
constexpr int64_t kWordsOfTask = 512;
constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr float kRemoved = -std::numeric_limits<float>::infinity();

// The lanes of x whose bit is 1, and -inf in the others.
OCTAVO_INLINE vf keep(vf x, uint32_t bits) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), vset(kRemoved), x);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes), lanes);
  return _mm256_blendv_ps(vset(kRemoved), x, _mm256_castsi256_ps(kept));
#else
  for (int i = 0; i < W; ++i) x[i] = (bits >> i) & 1u ? x[i] : kRemoved;
  return x;
#endif
}

void mask_word(float* logits, uint32_t word) {
  if (word == kAll) return;
  for (int i = 0; i < kTokensOfWord; i += W) vstore(logits + i, keep(vload(logits + i), word >> i));
}

void mask_rest(float* logits, uint32_t word, int64_t num_tokens) {
  for (int64_t i = 0; i < num_tokens; ++i)
    if (!((word >> i) & 1u)) logits[i] = kRemoved;
}

}  // namespace

void apply_token_bitmask(const ApplyTokenBitmaskArgs& args, int64_t num_masks, Team& team) {
  const int64_t num_full = args.vocab_size / kTokensOfWord, num_rest = args.vocab_size % kTokensOfWord;
  const int64_t num_slices = num_full / kWordsOfTask + 1;
  team.parallel_for(num_masks * num_slices, [&](int64_t task) {
    const int64_t index = task / num_slices, slice = task % num_slices;
    const auto* words = reinterpret_cast<const uint32_t*>(args.bitmask + index * args.bitmask_stride);
    float* logits = args.logits + (args.rows == nullptr ? index : args.rows[index]) * args.logits_stride;
    const int64_t end = slice + 1 < num_slices ? (slice + 1) * kWordsOfTask : num_full;
    for (int64_t i = slice * kWordsOfTask; i < end; ++i) mask_word(logits + i * kTokensOfWord, words[i]);
    if (num_rest > 0 && slice + 1 == num_slices)
      mask_rest(logits + num_full * kTokensOfWord, words[num_full], num_rest);
  });
}

}  // namespace octavo
