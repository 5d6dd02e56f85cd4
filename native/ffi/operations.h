// The operations a program may call. Each takes its call apart and checks types and shapes once (`decode`), checks the
// values it will follow before every run (`admit`: null, or what is wrong), and runs.
#pragma once

#include <variant>

#include "ffi/operands.h"

namespace strop {

struct Attention;

// What has been admitted already in the same run.
struct Admitted {
  const Attention* attention = nullptr;
};

struct Linear {
  LinearArgs args{};
  RowCount rows;
  int64_t num_x_rows = 0;

  ffi::Error decode(Operands& operands);
  const char* admit(Admitted& before);
  void run() const { kernels().linear(args); }
};

struct Embed {
  EmbedArgs args{};
  RowCount rows;

  ffi::Error decode(Operands& operands);
  const char* admit(Admitted& before);
  void run() const { kernels().embed(args); }
};

struct Attention {
  AttentionArgs args{};
  RowCount rows;
  int64_t num_blocks = 0, num_positions = 0, num_seqs = 0;

  ffi::Error decode(Operands& operands);
  const char* admit(Admitted& before);
  void run() const { kernels().attention(args); }
};

struct AddNorm {
  AddNormArgs args{};
  RowCount rows;

  ffi::Error decode(Operands& operands);
  const char* admit(Admitted& before);
  void run() const { kernels().add_norm(args); }
};

struct Sample {
  SampleArgs args{};
  RowCount rows;
  int num_rows = 0;

  ffi::Error decode(Operands& operands);
  const char* admit(Admitted& before);
  void run() const;
};

struct Greedy {
  const float* logits = nullptr;  // [num_rows, vocab_size]
  int32_t* token_ids = nullptr;   // [num_rows]
  int vocab_size = 0;
  RowCount rows;
  int num_rows = 0;

  ffi::Error decode(Operands& operands);
  const char* admit(Admitted& before);
  void run() const;
};

using Operation = std::variant<Linear, Embed, Attention, Sample, Greedy, AddNorm>;

}  // namespace strop
