// Rotation, cache write and attention in one call. A row's result depends only on its query and on the cache pages it
// sees, swept page by page in spans of kSpanLen slots whose sums are then merged in order: never on the rows that share
// the call, the block of rows it falls into, or the threads. Scores and sums accumulate in float32; queries, keys, values
// and unnormalised probabilities are bf16. Where the cache holds int8 codes, queries are rounded to int8 (absmax / 127 a
// head) and the probabilities of a page, times the scales of its values, to 8 bits of their largest; a page's products are
// exact then.
#include "kernels/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "kernels/attention_sums.h"
#include "kernels/scratch.h"
#include "simd/norm.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {
namespace {

constexpr int kQueryRows = 12;  // rows (queries x heads of a group) in one task
constexpr int kSpanLen = 8 * kBlockLen;  // slots that are summed up by themselves, perhaps by a thread of their own
constexpr int kTasksPerThread = 4;  // fewer runs and kv heads than that are cut into spans

int first_visible(const AttentionArgs& args, int row) {
  const int lo = args.kv_lo[row];
  return args.window_len > 0 ? std::max(lo, args.slots[row] + 1 - args.window_len) : lo;
}

// [rotary halves] out = x * cos + rotate_half(x) * sin, the tail copied.
void rotate(const AttentionArgs& args, int position, const float* x, float* out) {
  const int half = args.rope_cos ? args.rotary_dim / 2 : 0;
  const float* cosine = args.rope_cos + size_t(position) * half;
  const float* sine = args.rope_sin + size_t(position) * half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cosine[i] - b * sine[i];
    out[i + half] = b * cosine[i] + a * sine[i];
  }
  for (int i = 2 * half; i < args.head_dim; ++i) out[i] = x[i];
}

// A token's heads, normalised into `out` where there is a norm.
const float* normed(const AttentionArgs& args, NormArgs norm, const float* heads, int num_heads, float* out) {
  if (norm.weight == nullptr) return heads;
  for (int at = 0; at < num_heads * args.head_dim; at += norm.len) {
    normalise(norm, heads + at, out + at);
    if (norm.num_pieces == 1) continue;
    norm.weight += norm.len;
    if (norm.bias != nullptr) norm.bias += norm.len;
  }
  return out;
}

// Rotates row's query into `queries` (scaled, so that a score is a power of two) and writes its key and value.
template <class Item>
void enter_row(const AttentionArgs& args, int row, uint8_t* queries) {
  const int head_dim = args.head_dim, num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
  const float* x = args.qkv + size_t(row) * (num_heads + 2 * num_kv_heads) * head_dim;
  const int position = args.positions[row], slot = args.slots[row];
  float turned[kMaxHeadDim];
  auto* out = static_cast<float*>(scratch_bytes<8>(sizeof(float) * num_heads * head_dim));
  const float* query_heads = normed(args, args.q_norm, x, num_heads, out);
  for (int head = 0; head < num_heads; ++head) {
    rotate(args, position, query_heads + head * head_dim, turned);
    uint8_t* query = queries + (size_t(row) * num_heads + head) * head_dim * kQueryBytes;
    write_query<Item>(turned, head_dim, args.scale * kLog2E, query);
  }
  const bool partner_follows =
      row + 1 < args.num_rows && args.seqs[row + 1] == args.seqs[row] && args.slots[row + 1] == slot + 1;
  const float* key_heads = normed(args, args.k_norm, x + num_heads * head_dim, num_kv_heads, out);
  for (int head = 0; head < num_kv_heads; ++head) {
    rotate(args, position, key_heads + head * head_dim, turned);
    const float* value = x + (num_heads + num_kv_heads + head) * head_dim;
    write(page_of<Item>(args, args.seqs[row], slot, head), slot % kBlockLen, turned, value, partner_follows);
  }
}

// Powers of 2^(-8 / n), n the largest power of two up to num_heads, then every other power of 2^(-4 / n).
float alibi_slope(int head, int num_heads) {
  int whole = 1;
  while (whole * 2 <= num_heads) whole *= 2;
  return head < whole ? std::exp2(-8.0f * float(head + 1) / float(whole))
                      : std::exp2(-4.0f * float(2 * (head - whole) + 1) / float(whole));
}

// Sums up slots [begin, end), of one span, for up to kQueryRows rows; `after` is the page read after the last one.
// `fetches`: nobody else sweeps these pages, so that none is in the cache.
template <class Item>
void sum_span(const AttentionArgs& args, int seq, int kv_head, RowState* rows, int num_rows, int begin, int end,
              const uint8_t* after, bool fetches) {
  for (int i = 0; i < num_rows; ++i) rows[i].span = Sums();
  const int first_slot = begin / kBlockLen * kBlockLen;
  for (int slot = first_slot; slot < end; slot += kBlockLen) {
    const Page<Item> page = page_of<Item>(args, seq, slot, kv_head);
    const uint8_t* next = slot + kBlockLen < end ? page_of<Item>(args, seq, slot + kBlockLen, kv_head).data : after;
    for (int first = 0; first < num_rows; first += kMaxRows)
      sweep_page(args, rows + first, std::min(kMaxRows, num_rows - first), page, next, slot, slot == first_slot,
                 fetches && first + kMaxRows >= num_rows);
  }
}

// Some rows of one sequence, next to each other in the call.
struct Run {
  int row_begin, row_end;
  int lo, hi;  // the slots that some of them see
  int first_task;

  int num_spans() const { return lo < hi ? (hi - 1) / kSpanLen - lo / kSpanLen + 1 : 1; }
  int span_begin(int span) const { return span == 0 ? lo : (lo / kSpanLen + span) * kSpanLen; }
  int span_end(int span) const { return std::min(hi, (lo / kSpanLen + span + 1) * kSpanLen); }
};

// The tasks of a call: a run and a kv head each, or, where those are too few to share out, one of its spans. Then every
// task leaves its sums, and whoever finishes the last one of a run and kv head merges them, in the same order.
template <class Item>
class Tasks {
 public:
  Tasks(const AttentionArgs& args, const uint8_t* queries, const Pool& pool)
      : args_(args), queries_(queries), group_(args.num_heads / args.num_kv_heads) {
    const int max_run = std::max(1, kQueryRows / group_);
    runs_ = static_cast<Run*>(scratch_bytes<4>(sizeof(Run) * args.num_rows));
    for (int row = 0; row < args.num_rows; ++num_runs_) {
      Run& run = runs_[num_runs_] = {row, row, first_visible(args, row), args.kv_hi[row], 0};
      for (; row < args.num_rows && row - run.row_begin < max_run && args.seqs[row] == args.seqs[run.row_begin]; ++row) {
        run.lo = std::min(run.lo, first_visible(args, row));
        run.hi = std::max(run.hi, args.kv_hi[row]);
      }
      run.row_end = row;
    }
    std::reverse(runs_, runs_ + num_runs_);  // the last rows see most, so they go first
    const int num_pairs = num_runs_ * args.num_kv_heads;
    cut_ = num_pairs < kTasksPerThread * pool.num_threads();
    for (int i = 0; i < num_runs_; ++i) {
      runs_[i].first_task = num_tasks_;
      num_tasks_ += args.num_kv_heads * (cut_ ? runs_[i].num_spans() : 1);
    }
    if (!cut_) return;
    max_rows_ = std::max(group_, kQueryRows);
    parts_ = static_cast<Sums*>(scratch_bytes<6>((sizeof(Sums) + sizeof(float) * args.head_dim) * max_rows_ * num_tasks_));
    part_values_ = reinterpret_cast<float*>(parts_ + size_t(num_tasks_) * max_rows_);
    num_left_ = static_cast<std::atomic<int>*>(scratch_bytes<7>(sizeof(std::atomic<int>) * num_pairs));
    for (int pair = 0; pair < num_pairs; ++pair)
      num_left_[pair].store(runs_[pair / args.num_kv_heads].num_spans(), std::memory_order_relaxed);
  }

  int count() const { return num_tasks_; }

  void operator()(int task) const {
    const Place at = place_of(task), following = place_of(std::min(task + 1, num_tasks_ - 1));
    const Run &run = runs_[at.run], &next = runs_[following.run];
    const uint8_t* after =
        page_of<Item>(args_, args_.seqs[next.row_begin], next.span_begin(following.span), following.kv_head).data;
    const int num_rows = (run.row_end - run.row_begin) * group_;
    for (int first = 0; first < num_rows; first += kQueryRows) {
      const int end = std::min(num_rows, first + kQueryRows);
      if (cut_) leave_sums(run, at, task, first, end, after);
      else attend(run, at.kv_head, first, end, after);
    }
    if (!cut_ || num_left_[at.run * args_.num_kv_heads + at.kv_head].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int i = 0; i < num_rows; ++i) {
      Sums whole;
      float* y = args_.y + cell(run, at.kv_head, i);
      for (int span = 0; span < run.num_spans(); ++span) {
        const size_t part = size_t(task - at.span + span) * max_rows_ + i;
        const float shrink = exp2_nonpositive(-std::abs(whole.largest - parts_[part].largest));
        merge(parts_[part], part_values_ + part * args_.head_dim, shrink, args_.head_dim, whole, y);
      }
      divide(whole, sink(at.kv_head, i), args_.head_dim, y);
    }
  }

 private:
  struct Place {
    int run, kv_head, span;
  };

  Place place_of(int task) const {
    if (!cut_) return {task / args_.num_kv_heads, task % args_.num_kv_heads, 0};
    int run = 0;
    while (run + 1 < num_runs_ && runs_[run + 1].first_task <= task) ++run;
    const int in_run = task - runs_[run].first_task, num_spans = runs_[run].num_spans();
    return {run, in_run / num_spans, in_run % num_spans};
  }

  // Where query row i of a run and kv head lies in `queries` and in y.
  size_t cell(const Run& run, int kv_head, int i) const {
    return (size_t(run.row_begin + i / group_) * args_.num_heads + head_of(kv_head, i)) * args_.head_dim;
  }

  RowState row_state(const Run& run, int kv_head, int i, float* acc) const {
    const int row = run.row_begin + i / group_;
    const float slope = args_.alibi_scale == 0.0f ? 0.0f : alibi_slope(head_of(kv_head, i), args_.num_heads);
    return {queries_ + cell(run, kv_head, i) * kQueryBytes, args_.slots[row], first_visible(args_, row), args_.kv_hi[row],
            slope * args_.alibi_scale * kLog2E, acc, {}};
  }

  int head_of(int kv_head, int i) const { return kv_head * group_ + i % group_; }
  // Whether its sequence has no other rows in this call.
  bool is_alone(const Run& run) const {
    const int32_t* seqs = args_.seqs;
    const int before = run.row_begin - 1, after = run.row_end;
    return (before < 0 || seqs[before] != seqs[run.row_begin]) &&
           (after >= args_.num_rows || seqs[after] != seqs[run.row_begin]);
  }
  const float* sink(int kv_head, int i) const { return args_.sinks ? args_.sinks + head_of(kv_head, i) : nullptr; }

  // All spans of query rows [first, end), at most kQueryRows, one after the other.
  void attend(const Run& run, int kv_head, int first, int end, const uint8_t* after) const {
    const int num_rows = end - first, num_spans = run.num_spans(), seq = args_.seqs[run.row_begin];
    auto* acc = static_cast<float*>(scratch_bytes<3>(sizeof(float) * kQueryRows * args_.head_dim));
    RowState rows[kQueryRows];
    Sums whole[kQueryRows];
    float* y[kQueryRows];
    for (int i = 0; i < num_rows; ++i) {
      y[i] = args_.y + cell(run, kv_head, first + i);
      rows[i] = row_state(run, kv_head, first + i, y[i]);
    }
    for (int span = 0; span < num_spans; ++span) {
      const uint8_t* next = span + 1 < num_spans ? page_of<Item>(args_, seq, run.span_end(span), kv_head).data : after;
      sum_span<Item>(args_, seq, kv_head, rows, num_rows, run.span_begin(span), run.span_end(span), next,
                     is_alone(run) && first == 0);
      alignas(64) float wholes[16] = {}, spans[16] = {}, shrinks[16];
      for (int i = 0; i < num_rows; ++i) wholes[i] = whole[i].largest, spans[i] = rows[i].span.largest;
      if (span > 0) store(shrinks, shrink_of(load(wholes), load(spans)));
      for (int i = 0; i < num_rows; ++i) {
        if (rows[i].acc != y[i]) merge(rows[i].span, rows[i].acc, shrinks[i], args_.head_dim, whole[i], y[i]);
        else whole[i] = rows[i].span;
        if (!whole[i].empty) rows[i].acc = acc + size_t(i) * args_.head_dim;  // y is taken
      }
    }
    for (int i = 0; i < num_rows; ++i) divide(whole[i], sink(kv_head, first + i), args_.head_dim, y[i]);
  }

  // One span of them; its sums are the task's.
  void leave_sums(const Run& run, const Place& at, int task, int first, int end, const uint8_t* after) const {
    RowState rows[kQueryRows];
    const size_t part = size_t(task) * max_rows_;
    for (int i = first; i < end; ++i)
      rows[i - first] = row_state(run, at.kv_head, i, part_values_ + (part + i) * args_.head_dim);
    sum_span<Item>(args_, args_.seqs[run.row_begin], at.kv_head, rows, end - first, run.span_begin(at.span),
               run.span_end(at.span), after, is_alone(run) && first == 0);
    for (int i = first; i < end; ++i) parts_[part + i] = rows[i - first].span;
  }

  const AttentionArgs& args_;
  const uint8_t* queries_;  // [rows, heads, H] of kQueryBytes
  int group_;
  Run* runs_ = nullptr;
  int num_runs_ = 0, num_tasks_ = 0;
  bool cut_ = false;
  // When cut: for each task, max_rows_ sums and as many values [H]; for each run and kv head, tasks that are not done.
  int max_rows_ = 0;
  Sums* parts_ = nullptr;
  float* part_values_ = nullptr;
  std::atomic<int>* num_left_ = nullptr;
};

template <class Item>
void attend(const AttentionArgs& args) {
  Pool& pool = Pool::instance();
  auto* queries = static_cast<uint8_t*>(
      scratch_bytes<2>(size_t(kQueryBytes) * args.num_rows * args.num_heads * args.head_dim));
  // All keys and values are written before any is read: a row may see others of the same call.
  // Sixteen tokens of a sequence share lines of the cache, which two threads should not both write.
  const int rows_per_chunk = std::clamp(args.num_rows / (2 * pool.num_threads()), 4, 16);
  pool.run((args.num_rows + rows_per_chunk - 1) / rows_per_chunk, [&](int chunk) {
    const int end = std::min(args.num_rows, (chunk + 1) * rows_per_chunk);
    for (int row = chunk * rows_per_chunk; row < end; ++row) enter_row<Item>(args, row, queries);
  });
  const Tasks<Item> tasks(args, queries, pool);
  pool.run(tasks.count(), tasks);
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.num_rows == 0) return;
  if (args.quantised) attend<int8_t>(args);
  else attend<uint16_t>(args);
}

}  // namespace strop::STROP_ISA
