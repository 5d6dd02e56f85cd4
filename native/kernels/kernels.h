// One table of functions per ISA; the first call picks the best this machine runs (see isa.cpp).
#pragma once

#include <atomic>

#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/norm.h"
#include "kernels/probe.h"
#include "kernels/sample.h"

namespace strop {

struct Kernels {
  const char* isa;
  void (*linear)(const LinearArgs&);
  void (*embed)(const EmbedArgs&);
  void (*attention)(const AttentionArgs&);
  void (*add_norm)(const AddNormArgs&);
  void (*sample_rows)(const SampleArgs&, int row_begin, int row_end, void* scratch);
  void (*greedy_rows)(const float* logits, int vocab_size, int32_t* token_ids, int row_begin, int row_end);
  ProbeKernels probe;
};

const Kernels* kernels_or_null();  // null: none of them runs here
const Kernels& kernels();

// Nanoseconds spent running operations since the start: what remains of a step is overhead.
extern std::atomic<int64_t> kernel_ns;

}  // namespace strop
