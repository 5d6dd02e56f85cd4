// The sampling kernel behind a C interface, for tests/ops/test_sample_native.py, which compiles this file alone.
#include <cstdlib>

#include "kernels/sample.cpp"

extern "C" {

void sample_test_rows(const strop::SampleArgs* args, int row_begin, int row_end) {
  void* scratch = std::aligned_alloc(64, strop::sample_scratch_bytes(args->vocab_size));
  strop::sample_rows(*args, row_begin, row_end, scratch);
  std::free(scratch);
}

void sample_test_greedy(const float* logits, int vocab_size, int32_t* token_ids, int row_begin, int row_end) {
  strop::greedy_rows(logits, vocab_size, token_ids, row_begin, row_end);
}
}
