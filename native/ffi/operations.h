// The operations a program may call: each is decoded and checked first, then run.
#pragma once

#include <variant>

#include "ffi/operands.h"

namespace strop {

struct GreedyArgs {
  const float* logits;  // [num_rows, vocab_size]
  int32_t* token_ids;   // [num_rows]
  int num_rows;
  int vocab_size;
};
struct SampleRowsArgs {
  SampleArgs rows;
  int num_rows;
};

using Operation = std::variant<LinearArgs, EmbedArgs, AttentionArgs, SampleRowsArgs, GreedyArgs>;

ffi::Error decode_linear(Operands& operands, LinearArgs* args);
ffi::Error decode_embed(Operands& operands, EmbedArgs* args);
// `last`: the attention before it in the same program, or null: rows and tables checked there are not checked again.
ffi::Error decode_attention(Operands& operands, const AttentionArgs* last, AttentionArgs* args);
ffi::Error decode_sample(Operands& operands, SampleRowsArgs* args);
ffi::Error decode_greedy(Operands& operands, GreedyArgs* args);

void run(const SampleRowsArgs& args);
void run(const GreedyArgs& args);
inline void run(const LinearArgs& args) { kernels().linear(args); }
inline void run(const EmbedArgs& args) { kernels().embed(args); }
inline void run(const AttentionArgs& args) { kernels().attention(args); }

}  // namespace strop
