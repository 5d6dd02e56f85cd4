#include "ffi/operations.h"
#include "kernels/scratch.h"
#include "threads/pool.h"

namespace strop {

// logits, floats, ints, edit row, token, count, seen, bias, allowed, counts; token ids, logprobs, top ids, top logprobs.
ffi::Error Sample::decode(Operands& operands) {
  const auto logits = operands.next<ffi::F32>(), floats = operands.next<ffi::F32>();
  const auto ints = operands.next<ffi::U32>();
  const auto edit_row = operands.next<ffi::S32>(), edit_token = operands.next<ffi::S32>();
  const auto edit_count = operands.next<ffi::S32>(), edit_seen = operands.next<ffi::S32>();
  const auto edit_bias = operands.next<ffi::F32>();
  const auto allowed = operands.next<ffi::U32>();
  const auto counts = operands.next<ffi::S32>(), token_ids = operands.result<ffi::S32>();
  const auto logprobs = operands.result<ffi::F32>();
  const auto top_ids = operands.result<ffi::S32>();
  const auto top_logprobs = operands.result<ffi::F32>();
  const int num_top = operands.attr();
  if (!operands.all_taken()) return invalid("sample: operands of other number or type than expected");
  if (logits.dims.size() != 2 || !rows.bind(counts, 1, logits.dims[0])) return invalid("sample: no such row count");
  const int64_t max_rows = logits.dims[0], num_edits = edit_row.count();
  if (floats.count() != max_rows * 6 || ints.count() != max_rows * 4 || token_ids.count() != max_rows ||
      logprobs.count() != max_rows || num_top < 0 || top_ids.count() != max_rows * num_top ||
      top_logprobs.count() != max_rows * num_top)
    return invalid("sample: shapes of logits, parameters and results disagree");
  if (edit_token.count() != num_edits || edit_count.count() != num_edits || edit_seen.count() != num_edits ||
      edit_bias.count() != num_edits)
    return invalid("sample: the edits differ in length");
  const int64_t mask_words = allowed.count() == 0 ? 0 : (logits.dims[1] + 31) / 32;
  if (allowed.count() != max_rows * mask_words) return invalid("sample: the mask has another shape than the logits");
  args = {logits.data, floats.data, ints.data, edit_row.data, edit_token.data, edit_count.data, edit_seen.data,
                edit_bias.data, allowed.data, token_ids.data, logprobs.data, top_ids.data, top_logprobs.data,
                int(logits.dims[1]), int(num_edits), int(mask_words), num_top};
  return ffi::Error::Success();
}

const char* Sample::admit(Admitted&) { return rows.read(&num_rows) ? nullptr : "sample: bad row count"; }

void Sample::run() const {
  const size_t bytes = sample_scratch_bytes(args.vocab_size);
  Pool::instance().run(num_rows, [&](int row) { kernels().sample_rows(args, row, row + 1, scratch_bytes<0>(bytes)); });
}

// logits, counts, token ids.
ffi::Error Greedy::decode(Operands& operands) {
  const auto scores = operands.next<ffi::F32>();
  const auto counts = operands.next<ffi::S32>(), chosen = operands.result<ffi::S32>();
  if (!operands.all_taken()) return invalid("greedy: operands of other number or type than expected");
  if (scores.dims.size() != 2 || !rows.bind(counts, 1, scores.dims[0])) return invalid("greedy: no such row count");
  if (chosen.count() != scores.dims[0]) return invalid("greedy: shapes disagree");
  logits = scores.data, token_ids = chosen.data, vocab_size = int(scores.dims[1]);
  return ffi::Error::Success();
}

const char* Greedy::admit(Admitted&) { return rows.read(&num_rows) ? nullptr : "greedy: bad row count"; }

void Greedy::run() const {
  Pool::instance().run(num_rows, [&](int row) { kernels().greedy_rows(logits, vocab_size, token_ids, row, row + 1); });
}

}  // namespace strop
