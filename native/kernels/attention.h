// Rotary positions, the write into the paged cache, and attention over it: the arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/norm.h"

namespace strop {

constexpr int kAttentionBlockLen = 32;  // tokens of a page

// The cache of one layer is [num_blocks][K kv heads][2] pages of block_len x H bf16:
//   keys   [H/2][block_len][2]   (lanes are tokens: a product with a query sweeps the head dimension)
//   values [block_len/2][H][2]   (lanes are head dimensions: a product with probabilities sweeps the tokens)
struct AttentionArgs {
  const float* qkv;          // [num_rows, (N + 2 K) H]
  uint16_t* cache;           // this layer's pages
  const int32_t* positions;  // [num_rows] for the rotation
  const int32_t* slots;      // [num_rows] place in the sequence's cache
  const int32_t* kv_lo;      // [num_rows] first visible slot
  const int32_t* kv_hi;      // [num_rows] one past the last visible slot
  const int32_t* seqs;       // [num_rows] row of block_tables
  const int32_t* block_tables;  // [num_seqs, table_len]
  const float* rope_cos;     // [max_positions, rotary_dim / 2], or null
  const float* rope_sin;
  NormArgs q_norm;           // before the rotation: of each head (len H), or of all heads together (len N H)
  NormArgs k_norm;           // the same, H or K H
  const float* sinks;        // [N] a score per head that takes its share of the softmax and gives nothing, or null
  float* y;                  // [num_rows, N H]
  int num_rows;
  int table_len;
  int block_len;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int rotary_dim;
  float scale;
  float soft_cap;            // 0: none, else scores become soft_cap * tanh(score / soft_cap)
  float alibi_scale;         // 0: none, else scores get alibi_scale * slope * (key's slot - query's slot)
  int window_len;            // 0: none, else a row sees at most so many slots, its own the last
};

}  // namespace strop
