#include "ffi/buffers.h"
#include "kernels/scratch.h"
#include "threads/pool.h"

namespace strop {
namespace {

ffi::Error sample(ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> floats, ffi::Buffer<ffi::U32> ints,
                  ffi::Buffer<ffi::S32> edit_row, ffi::Buffer<ffi::S32> edit_token, ffi::Buffer<ffi::S32> edit_count,
                  ffi::Buffer<ffi::S32> edit_seen, ffi::Buffer<ffi::F32> edit_bias, ffi::Buffer<ffi::S32> counts,
                  ffi::ResultBuffer<ffi::S32> token_ids, ffi::ResultBuffer<ffi::F32> logprobs,
                  ffi::ResultBuffer<ffi::S32> top_ids, ffi::ResultBuffer<ffi::F32> top_logprobs, int32_t num_top) {
  const auto shape = logits.dimensions();
  const size_t num_rows = shape[0], num_edits = edit_row.element_count();
  int rows;
  if (!bounded(counts, 1, shape[0], &rows)) return invalid("sample: bad row count");
  if (floats.element_count() != num_rows * 6 || ints.element_count() != num_rows * 4 ||
      token_ids->element_count() != num_rows || logprobs->element_count() != num_rows || num_top < 0 ||
      top_ids->element_count() != num_rows * num_top || top_logprobs->element_count() != num_rows * num_top)
    return invalid("sample: shapes of logits, parameters and results disagree");
  if (edit_token.element_count() != num_edits || edit_count.element_count() != num_edits ||
      edit_seen.element_count() != num_edits || edit_bias.element_count() != num_edits)
    return invalid("sample: the edits differ in length");
  const SampleArgs args{logits.typed_data(), floats.typed_data(), ints.typed_data(), edit_row.typed_data(),
                        edit_token.typed_data(), edit_count.typed_data(), edit_seen.typed_data(),
                        edit_bias.typed_data(), token_ids->typed_data(), logprobs->typed_data(),
                        top_ids->typed_data(), top_logprobs->typed_data(), int(shape[1]), int(num_edits), num_top};
  const size_t bytes = sample_scratch_bytes(args.vocab_size);
  Pool::instance().run(rows, [&](int row) { kernels().sample_rows(args, row, row + 1, scratch_bytes<0>(bytes)); });
  return ffi::Error::Success();
}

ffi::Error greedy(ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> counts, ffi::ResultBuffer<ffi::S32> token_ids) {
  const auto shape = logits.dimensions();
  int rows;
  if (!bounded(counts, 1, shape[0], &rows)) return invalid("greedy: bad row count");
  if (int64_t(token_ids->element_count()) != shape[0]) return invalid("greedy: shapes disagree");
  const float* data = logits.typed_data();
  int32_t* out = token_ids->typed_data();
  Pool::instance().run(rows, [&](int row) { kernels().greedy_rows(data, int(shape[1]), out, row, row + 1); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace strop

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_sample, strop::sample, xla::ffi::Ffi::Bind()
    .Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::U32>>()
    .Arg<xla::ffi::Buffer<xla::ffi::S32>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Arg<xla::ffi::Buffer<xla::ffi::S32>>().Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Ret<xla::ffi::Buffer<xla::ffi::S32>>().Ret<xla::ffi::Buffer<xla::ffi::F32>>()
    .Ret<xla::ffi::Buffer<xla::ffi::S32>>().Ret<xla::ffi::Buffer<xla::ffi::F32>>()
    .Attr<int32_t>("num_top"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_greedy, strop::greedy, xla::ffi::Ffi::Bind()
    .Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Ret<xla::ffi::Buffer<xla::ffi::S32>>());
