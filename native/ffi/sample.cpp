#include "ffi/operations.h"
#include "kernels/scratch.h"
#include "threads/pool.h"

namespace strop {

// logits, floats, ints, edit row, token, count, seen, bias, counts; token ids, logprobs, top ids, top logprobs.
ffi::Error decode_sample(Operands& operands, SampleRowsArgs* args) {
  const auto logits = operands.next<ffi::F32>(), floats = operands.next<ffi::F32>();
  const auto ints = operands.next<ffi::U32>();
  const auto edit_row = operands.next<ffi::S32>(), edit_token = operands.next<ffi::S32>();
  const auto edit_count = operands.next<ffi::S32>(), edit_seen = operands.next<ffi::S32>();
  const auto edit_bias = operands.next<ffi::F32>();
  const auto counts = operands.next<ffi::S32>(), token_ids = operands.next<ffi::S32>();
  const auto logprobs = operands.next<ffi::F32>();
  const auto top_ids = operands.next<ffi::S32>();
  const auto top_logprobs = operands.next<ffi::F32>();
  const int num_top = operands.attr();
  if (!operands.all_taken()) return invalid("sample: operands of other number or type than expected");
  if (logits.dims.size() != 2 || !bounded(counts, 1, logits.dims[0], &args->num_rows)) return invalid("sample: bad row count");
  const int64_t num_rows = logits.dims[0], num_edits = edit_row.count();
  if (floats.count() != num_rows * 6 || ints.count() != num_rows * 4 || token_ids.count() != num_rows ||
      logprobs.count() != num_rows || num_top < 0 || top_ids.count() != num_rows * num_top ||
      top_logprobs.count() != num_rows * num_top)
    return invalid("sample: shapes of logits, parameters and results disagree");
  if (edit_token.count() != num_edits || edit_count.count() != num_edits || edit_seen.count() != num_edits ||
      edit_bias.count() != num_edits)
    return invalid("sample: the edits differ in length");
  args->rows = {logits.data, floats.data, ints.data, edit_row.data, edit_token.data, edit_count.data, edit_seen.data,
                edit_bias.data, token_ids.data, logprobs.data, top_ids.data, top_logprobs.data, int(logits.dims[1]),
                int(num_edits), num_top};
  return ffi::Error::Success();
}

// logits, counts, token ids.
ffi::Error decode_greedy(Operands& operands, GreedyArgs* args) {
  const auto logits = operands.next<ffi::F32>();
  const auto counts = operands.next<ffi::S32>(), token_ids = operands.next<ffi::S32>();
  if (!operands.all_taken()) return invalid("greedy: operands of other number or type than expected");
  if (logits.dims.size() != 2 || !bounded(counts, 1, logits.dims[0], &args->num_rows)) return invalid("greedy: bad row count");
  if (token_ids.count() != logits.dims[0]) return invalid("greedy: shapes disagree");
  args->logits = logits.data, args->token_ids = token_ids.data, args->vocab_size = int(logits.dims[1]);
  return ffi::Error::Success();
}

void run(const SampleRowsArgs& args) {
  const size_t bytes = sample_scratch_bytes(args.rows.vocab_size);
  Pool::instance().run(args.num_rows,
                       [&](int row) { kernels().sample_rows(args.rows, row, row + 1, scratch_bytes<0>(bytes)); });
}

void run(const GreedyArgs& args) {
  Pool::instance().run(args.num_rows, [&](int row) {
    kernels().greedy_rows(args.logits, args.vocab_size, args.token_ids, row, row + 1);
  });
}

}  // namespace strop
