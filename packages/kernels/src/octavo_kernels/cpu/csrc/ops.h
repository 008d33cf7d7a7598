// The ops: one struct of arguments each, as the Python side fills it, and the function that runs it on a team.
//
// Fields are pointers and 64-bit integers or 32-bit floats in an order without gaps; `cpu/native.py` mirrors every
// struct. Strides count elements. A row is one token of the step.
//
// Every function is called by all threads of a team with the same arguments, and must end with all its work done
// (after its last parallel_for nothing of it is pending). `num_rows` is the number of rows of this call.

#pragma once

#include <cstdint>

#include "pool.h"

namespace octavo {

// What a recorded program is run on; a single op has them in its arguments.
struct Step {
  int64_t num_tokens;
  int64_t num_seqs;
};

enum class Dtype : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3 };

enum class WeightFormat : int64_t {
  kGrouped = -1,  // a header says the rest, see grouped.h
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kQ4_0 = 3,
  kQ4_1 = 4,
  kQ8_0 = 5,
  kQ5_0 = 6,  // from here on formats with planes, see planes.h
  kQ5_1 = 7,
  kQ2_K = 8,
  kQ3_K = 9,
  kQ4_K = 10,
  kQ5_K = 11,
  kQ6_K = 12,
  kIQ4_NL = 13,
  kIQ4_XS = 14,
  kMXFP4 = 15,
  kNVFP4 = 16,
  kQ8_K = 17,
  kTQ2_0 = 18,
  kTQ1_0 = 19,
  kIQ2_XXS = 20,  // from here on formats whose codes are points of a grid, see grid_codes.h
  kIQ2_XS = 21,
  kIQ2_S = 22,
  kIQ3_XXS = 23,
  kIQ3_S = 24,
  kIQ1_S = 25,
  kIQ1_M = 26,
};

// ---- products -------------------------------------------------------------------------------------------------------

struct PackWeightArgs {  // rows: none
  const void* stored;    // [out_features, in_features] in the checkpoint's form, contiguous
  void* packed;
  int64_t format;
  int64_t out_features;
  int64_t in_features;
};

struct PackedLinearArgs {  // rows: of x and out
  const float* x;          // [rows, in_features]
  const void* weight;
  const void* grid;        // of formats whose codes are points of one, see grid_codes.h; else null
  const float* bias;       // [out_features] or null
  float* out;              // [rows, out_features]
  void* workspace;         // 136 bytes for every group of 32 inputs of 16 rows and each 16 begun, 160 for
                           // every group of grouped weights; may be null for dense formats
  int64_t x_stride;
  int64_t out_stride;
  int64_t format;
  int64_t out_features;
  int64_t in_features;
  int64_t int8_activations;
};

struct PackedEmbeddingArgs {  // rows: of token_ids and out
  const void* weight;
  const void* grid;        // of formats whose codes are points of one, see grid_codes.h; else null
  const int64_t* token_ids;
  float* out;  // [rows, in_features]
  int64_t out_stride;
  int64_t format;
  int64_t out_features;
  int64_t in_features;
};

struct PackedArgmaxArgs {  // rows: of x, ids and best
  const float* x;          // [rows, in_features]
  const void* weight;
  const void* grid;        // of formats whose codes are points of one, see grid_codes.h; else null
  const float* norms;      // [out_features], at least those of the outputs' weights; null: nothing is screened
  int64_t* ids;            // [rows]
  float* best;             // [rows]
  void* workspace;
  int64_t x_stride;
  int64_t format;
  int64_t out_features;
  int64_t in_features;
  int64_t int8_activations;
};

// ---- between the products -------------------------------------------------------------------------------------------

struct RmsNormArgs {    // rows: of x
  const float* x;       // [rows, size]
  float* residual;      // [rows, size] or null; x is added to it in place, and the norm is of the sum
  const float* weight;  // [size]
  float* out;           // [rows, size], may be x
  int64_t x_stride;
  int64_t residual_stride;
  int64_t out_stride;
  int64_t size;
  float eps;
  float offset;  // added to the weight
};

struct GatedArgs {  // rows: of x; out = activation(x[:, :size]) * x[:, size:]
  const float* x;   // [rows, 2 size]
  float* out;       // [rows, size]
  int64_t x_stride;
  int64_t out_stride;
  int64_t size;
  int64_t activation;  // 0 SiLU, 1 GELU by erf, 2 GELU by tanh
};

struct RopeKvWriteArgs {  // rows: tokens
  float* q;               // [tokens, num_heads, head_dim], rotated in place
  float* k;               // [tokens, num_kv_heads, head_dim], rotated in place
  const float* v;         // [tokens, num_kv_heads, head_dim]
  const int64_t* positions;
  const float* cos_sin;         // [max_position, rot_dim], contiguous
  void* k_cache;                // [num_blocks, num_kv_heads, block_size, head_dim] of cache_dtype
  void* v_cache;
  const int64_t* slot_mapping;  // [tokens], -1 writes nothing
  const float* q_norm_weight;   // [head_dim] or null
  const float* k_norm_weight;   // [head_dim] or null
  float* k_scale;               // int8 caches: [num_blocks, num_kv_heads, block_size], written; null for the others
  float* v_scale;
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  int64_t k_block_stride, k_cache_head_stride, k_slot_stride;
  int64_t v_block_stride, v_cache_head_stride, v_slot_stride;
  int64_t k_scale_block_stride, k_scale_head_stride, k_scale_slot_stride;
  int64_t v_scale_block_stride, v_scale_head_stride, v_scale_slot_stride;
  int64_t num_heads, num_kv_heads, head_dim, rot_dim, block_size;
  int64_t cache_dtype;
  int64_t interleaved;
  int64_t only_write;  // 1: no norm and no rotation; q, positions, cos_sin unused (the op write_kv)
  int64_t known_scales;  // 1: scales are [num_kv_heads], and read
  float eps;
  float unused;
};

// ---- attention ------------------------------------------------------------------------------------------------------

struct PagedAttentionArgs {  // rows: tokens; in a program the number of sequences comes from the step
  const float* q;            // [tokens, num_heads, head_dim]
  const void* k_cache;       // [num_blocks, num_kv_heads, block_size, head_dim] of cache_dtype
  const void* v_cache;
  const float* k_scale;      // [num_blocks, num_kv_heads, block_size] contiguous, or null (int8 caches)
  const float* v_scale;
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* block_table;      // [num_seqs, max_blocks]
  const float* sinks;              // [num_heads] or null
  const float* alibi_slopes;       // [num_heads] or null
  float* out;                      // [tokens, num_heads, head_dim]
  float* lse;                      // [tokens, num_heads] contiguous, or null
  int64_t q_token_stride, q_head_stride;
  int64_t out_token_stride, out_head_stride;
  int64_t k_block_stride, k_head_stride, k_slot_stride;
  int64_t v_block_stride, v_head_stride, v_slot_stride;
  int64_t block_table_stride;
  int64_t num_seqs;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t cache_dtype;
  int64_t causal;
  int64_t window;  // 0: none
  float scale;
  float soft_cap;  // 0: none
};

// ---- sampling -------------------------------------------------------------------------------------------------------

struct NoiseArgs {  // rows: of seeds, sequence_index, positions and out
  const int64_t* seeds;
  const int64_t* sequence_index;
  const int64_t* positions;
  void* out;            // [rows, num_columns] contiguous, fp32; or int64 for the words that noise is made from
  int64_t num_columns;
  int64_t words;        // 1: out is int64
};

struct NoiseAtArgs {  // rows: single values, each of its own row of noise
  const int64_t* seeds;
  const int64_t* sequence_index;
  const int64_t* positions;
  const int64_t* columns;
  float* out;
};

struct SampleTokensArgs {  // rows: draws
  const float* logits;     // [sources, vocab_size]
  const int64_t* source_rows;  // [draws], the row of logits that each goes by; null: its own
  const float* temperature;    // [draws], 0 takes the arg-max
  const int64_t* top_k;        // [draws] or null, 0 keeps all
  const float* top_p;          // [draws] or null, 1 keeps all
  const float* min_p;          // [draws] or null, 0 keeps all
  const int64_t* seeds;
  const int64_t* sequence_index;
  const int64_t* positions;
  int64_t* token_ids;  // [draws]
  float* best;         // [draws], the largest logit
  int64_t logits_stride;
  int64_t vocab_size;
};

struct PackedSampleArgs {   // rows: draws
  PackedLinearArgs linear;  // of num_rows rows, without a bias and with inputs in full; out is overwritten
  SampleTokensArgs draws;   // from linear's out, without top_k, top_p and min_p
  const float* norms;       // as in PackedArgmaxArgs
  int64_t num_rows;
};

struct ApplyTokenBitmaskArgs {  // rows: masks
  float* logits;                // [rows of logits, vocab_size], changed in place
  const int32_t* bitmask;       // [masks, words], 1 allows a token
  const int64_t* rows;          // [masks], the row of logits that each is for; null: its own
  int64_t logits_stride;
  int64_t bitmask_stride;
  int64_t vocab_size;
};

// ---- adapters -------------------------------------------------------------------------------------------------------

struct LoraPart {         // one of the linears that lie side by side in a product
  const void* a;          // [adapters, max_rank, in_features] contiguous
  const void* b;          // [adapters, max_rank, num_columns] contiguous
  const int32_t* ranks;   // [adapters]
  const float* scales;    // [adapters]
  const float* factors;   // [adapters, num_columns] contiguous, or null: sums are multiplied by them, out's share too
  int64_t first_column;   // of out
  int64_t num_columns;
};

struct LoraArgs {          // rows: of x and out; a shrink looks at no b and out, an expand at no x and a
  const float* x;          // [rows, in_features]
  float* out;              // [rows, columns of all parts], added to
  const LoraPart* parts;
  const int32_t* rows;     // [num_tiles, tile_rows], the rows of a tile; those that are no row are passed over
  const int32_t* groups;   // [num_tiles], the adapter of a tile; from the first one below 0 on there are no more
  float* shrunk;           // [num_parts, num_spans, rows, max_rank], written by a shrink and read by an expand
  int64_t x_stride;
  int64_t out_stride;
  int64_t num_parts;
  int64_t num_tiles;
  int64_t tile_rows;       // at most 128
  int64_t num_spans;
  int64_t span_inputs;
  int64_t shrunk_part_stride;
  int64_t shrunk_span_stride;
  int64_t max_rank;
  int64_t in_features;
  int64_t a_dtype;
  int64_t b_dtype;
};

struct GroupRowsArgs {     // rows: of ids
  const void* ids;         // [rows] int32 or int64; outside 0 .. num_groups - 1: in no group
  int32_t* rows;           // [num_tiles, tile_rows]; the number of rows where there is none
  int32_t* groups;         // [num_tiles]; -1 for tiles that are not needed
  int32_t* places;         // [num_groups], overwritten
  int64_t num_groups;
  int64_t num_tiles;       // enough for any ids
  int64_t tile_rows;
  int64_t bytes_of_id;
};

// ---- the table of ops: the number of each is part of the ABI --------------------------------------------------------

enum class OpKind : int32_t {
  kPackWeight = 0,
  kPackedLinear = 1,
  kPackedEmbedding = 2,
  kPackedArgmax = 3,
  kRmsNorm = 4,
  kGated = 5,
  kRopeKvWrite = 6,
  kPagedAttention = 7,
  kNoise = 8,
  kNoiseAt = 9,
  kSampleTokens = 10,
  kApplyTokenBitmask = 11,
  kLoraShrink = 12,
  kLoraExpand = 13,
  kLoraLinear = 14,
  kGroupRows = 15,
  kPackedSample = 16,
};

struct Op {
  int32_t kind;
  int32_t per_token;  // 1: num_rows is the step's num_tokens when a step is given
  int64_t num_rows;
  const void* args;
};

void pack_weight(const PackWeightArgs&, Team&);
void packed_linear(const PackedLinearArgs&, int64_t num_rows, Team&);
void packed_embedding(const PackedEmbeddingArgs&, int64_t num_rows, Team&);
void packed_argmax(const PackedArgmaxArgs&, int64_t num_rows, Team&);
void rms_norm(const RmsNormArgs&, int64_t num_rows, Team&);
void gated(const GatedArgs&, int64_t num_rows, Team&);
void rope_kv_write(const RopeKvWriteArgs&, int64_t num_rows, Team&);
void paged_attention(const PagedAttentionArgs&, int64_t num_rows, int64_t num_seqs, Team&);
void noise(const NoiseArgs&, int64_t num_rows, Team&);
void noise_at(const NoiseAtArgs&, int64_t num_values, Team&);
void sample_tokens(const SampleTokensArgs&, int64_t num_rows, Team&);
void packed_sample(const PackedSampleArgs&, int64_t num_draws, Team&);
void apply_token_bitmask(const ApplyTokenBitmaskArgs&, int64_t num_masks, Team&);
void lora_shrink(const LoraArgs&, int64_t num_rows, Team&);
void lora_expand(const LoraArgs&, int64_t num_rows, Team&);
void lora_linear(const LoraArgs&, int64_t num_rows, Team&);
void group_rows(const GroupRowsArgs&, int64_t num_rows, Team&);

}  // namespace octavo
