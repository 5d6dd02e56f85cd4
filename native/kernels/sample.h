// One token per row of logits. src/strop/ops/sample/reference.py defines every step; this gives the same tokens.
#pragma once

#include <cstddef>
#include <cstdint>

namespace strop {

// Shapes as in ops/sample/__init__.py. Edits are sorted by row with padding (row -1) last; pairs are unique.
struct SampleArgs {
  const float* logits;  // [num_rows, vocab_size], contiguous
  const float* floats;  // [num_rows, 6]
  const uint32_t* ints;  // [num_rows, 4]
  const int32_t* edit_row;  // [num_edits]
  const int32_t* edit_token;
  const int32_t* edit_count;
  const int32_t* edit_seen;
  const float* edit_bias;
  const uint32_t* allowed;  // [num_rows, mask_words]: bit t % 32 of word t / 32 for token t
  int32_t* token_ids;  // [num_rows]; -1: a NaN in the row, or nothing left to choose
  float* logprobs;  // [num_rows]; zeros when num_top is 0
  int32_t* top_ids;  // [num_rows, num_top]
  float* top_logprobs;  // [num_rows, num_top]
  int vocab_size;
  int num_edits;
  int mask_words;  // 0: all tokens are allowed
  int num_top;
};

// Bytes of memory, 64-byte aligned, that `sample_rows` needs for itself: one piece per calling thread.
constexpr size_t sample_scratch_bytes(int vocab_size) {
  return (size_t(vocab_size) + 63) / 64 * 64 * (2 * sizeof(float) + sizeof(uint64_t));
}

}  // namespace strop

// Per ISA, as the other kernels; plain `strop` where a build has no ISA variants.
#ifdef STROP_ISA
namespace strop::STROP_ISA {
#else
namespace strop {
#endif

// Rows [row_begin, row_end). Rows are independent, and what a row gets depends on nothing but that row.
void sample_rows(const SampleArgs& args, int row_begin, int row_end, void* scratch);

// The same tokens for rows with temperature 0, no edits and no log probabilities: one sweep at memory speed.
void greedy_rows(const float* logits, int vocab_size, int32_t* token_ids, int row_begin, int row_end);

}
