// Rotation, cache write and attention in one call. A row's result depends only on its query and on the cache pages it
// sees, swept page by page in spans of kSpanLen slots whose sums are then merged in order: never on the rows that share
// the call, the block of rows it falls into, or the threads. Scores and sums accumulate in float32; queries, keys, values
// and unnormalised probabilities are bf16.
#include "kernels/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "kernels/scratch.h"
#include "simd/norm.h"
#include "simd/vec.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {
namespace {

constexpr int kBlockLen = kAttentionBlockLen;
constexpr int kMaxRows = 6;    // rows in one register block: 6 x 4 accumulators of head dimensions
constexpr int kQueryRows = 12;  // rows (queries x heads of a group) in one task
constexpr int kSpanLen = 8 * kBlockLen;  // slots that are summed up by themselves, perhaps by a thread of their own
constexpr int kTasksPerThread = 4;  // fewer runs and kv heads than that are cut into spans
constexpr int kPrefetchRows = 4;  // a few rows wait for the pages; many find them in the cache already
constexpr float kLog2E = 1.44269504f;  // scores are powers of two in here

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

void narrow(const float* x, int len, float factor, uint16_t* out) {
  int i = 0;
  for (; i + 32 <= len; i += 32)
    store_bf16(out + i, mul(load(x + i), broadcast(factor)), mul(load(x + i + 16), broadcast(factor)));
  for (; i < len; ++i) out[i] = float_to_bf16(x[i] * factor);
}

uint16_t* page_of(const AttentionArgs& args, int seq, int slot, int kv_head) {
  const size_t page = size_t(args.head_dim) * kBlockLen;
  const size_t block = args.block_tables[size_t(seq) * args.table_len + slot / kBlockLen];
  return args.cache + ((block * args.num_kv_heads + kv_head) * 2) * page;
}

// A token's heads, normalised into `out` where there is a norm.
const float* normed(const AttentionArgs& args, const NormArgs& norm, const float* heads, int num_heads, float* out) {
  if (norm.weight == nullptr) return heads;
  for (int at = 0; at < num_heads * args.head_dim; at += norm.len) normalise(norm, heads + at, out + at);
  return out;
}

// Rotates row's query into `queries` (scaled, so that a score is a power of two) and writes its key and value.
void enter_row(const AttentionArgs& args, int row, uint16_t* queries) {
  const int head_dim = args.head_dim, num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
  const float* x = args.qkv + size_t(row) * (num_heads + 2 * num_kv_heads) * head_dim;
  const int position = args.positions[row], slot = args.slots[row], in = slot % kBlockLen;
  float turned[512];
  alignas(64) uint16_t narrowed[512];
  auto* out = static_cast<float*>(scratch_bytes<8>(sizeof(float) * num_heads * head_dim));
  const float* query_heads = normed(args, args.q_norm, x, num_heads, out);
  for (int head = 0; head < num_heads; ++head) {
    rotate(args, position, query_heads + head * head_dim, turned);
    narrow(turned, head_dim, args.scale * kLog2E, queries + (size_t(row) * num_heads + head) * head_dim);
  }
  const bool partner_follows =
      row + 1 < args.num_rows && args.seqs[row + 1] == args.seqs[row] && args.slots[row + 1] == slot + 1;
  const float* key_heads = normed(args, args.k_norm, x + num_heads * head_dim, num_kv_heads, out);
  for (int head = 0; head < num_kv_heads; ++head) {
    uint16_t* keys = page_of(args, args.seqs[row], slot, head);
    uint16_t* values = keys + size_t(head_dim) * kBlockLen;
    rotate(args, position, key_heads + head * head_dim, turned);
    narrow(turned, head_dim, 1.0f, narrowed);
    for (int h = 0; h < head_dim; h += 2) std::memcpy(keys + (h / 2 * kBlockLen + in) * 2, narrowed + h, 4);
    narrow(x + (num_heads + num_kv_heads + head) * head_dim, head_dim, 1.0f, narrowed);
    uint16_t* place = values + size_t(in / 2) * head_dim * 2;
    if (in % 2 == 1) {
      for (int h = 0; h < head_dim; ++h) place[h * 2 + 1] = narrowed[h];
    } else if (partner_follows) {
      for (int h = 0; h < head_dim; ++h) place[h * 2] = narrowed[h];
    } else {  // the pair's other half may hold anything: 0 keeps 0 x stale from becoming NaN
      for (int h = 0; h < head_dim; ++h) {
        const uint32_t pair = narrowed[h];
        std::memcpy(place + h * 2, &pair, 4);
      }
    }
  }
}

// Powers of 2^(-8 / n), n the largest power of two up to num_heads, then every other power of 2^(-4 / n).
float alibi_slope(int head, int num_heads) {
  int whole = 1;
  while (whole * 2 <= num_heads) whole *= 2;
  return head < whole ? std::exp2(-8.0f * float(head + 1) / float(whole))
                      : std::exp2(-4.0f * float(2 * (head - whole) + 1) / float(whole));
}

// A softmax's sums over some slots; the weighted values [H] lie beside it.
struct Sums {
  float largest = -std::numeric_limits<float>::infinity();
  bool empty = true;  // no slot was seen; scores that are not numbers are not nothing
  Floats total = zero_floats();
};

struct RowState {
  const uint16_t* query;
  int slot, lo, hi;
  float slope;  // of the bias on its scores, as powers of two; 0: none
  float* acc;  // [H], of the span at hand
  Sums span;
};

float exp2_nonpositive(float x) {
  alignas(64) float lanes[16];
  store(lanes, exp2_nonpositive(broadcast(x)));
  return lanes[0];
}

// What the sums with the smaller maximum shrink by when two are added; not a number when both are empty.
Floats shrink_of(Floats largest, Floats other) { return exp2_nonpositive(sub(zero_floats(), abs(sub(largest, other)))); }

// whole += part, in place.
void merge(const Sums& part, const float* acc, float shrink, int head_dim, Sums& whole, float* y) {
  if (part.empty) return;
  if (whole.empty) {
    whole = part;
    std::memcpy(y, acc, sizeof(float) * head_dim);
    return;
  }
  const Floats factor = broadcast(shrink);
  if (part.largest <= whole.largest) {
    for (int h = 0; h < head_dim; h += 16) store(y + h, fma(load(acc + h), factor, load(y + h)));
    whole.total = fma(part.total, factor, whole.total);
  } else {
    for (int h = 0; h < head_dim; h += 16) store(y + h, fma(load(y + h), factor, load(acc + h)));
    whole = {part.largest, false, fma(whole.total, factor, part.total)};
  }
}

// y = values / total, with the sink's share in the total.
void divide(const Sums& whole, const float* sink, int head_dim, float* y) {
  if (whole.empty) {
    std::memset(y, 0, sizeof(float) * head_dim);
    return;
  }
  float weight = sum_lanes(whole.total), shrink = 1.0f;
  if (sink != nullptr) {
    const float score = *sink * kLog2E, largest = std::max(whole.largest, score);
    shrink = exp2_nonpositive(whole.largest - largest);
    weight = weight * shrink + exp2_nonpositive(score - largest);
  }
  const Floats inverse = broadcast(weight > 0.0f ? shrink / weight : 0.0f);
  for (int h = 0; h < head_dim; h += 16) store(y + h, mul(load(y + h), inverse));
}

template <int kRows>
void scores(const RowState* rows, const uint16_t* keys, const uint16_t* next, int head_dim, Floats (*s)[2]) {
  for (int r = 0; r < kRows; ++r) s[r][0] = s[r][1] = zero_floats();
  for (int h = 0; h < head_dim; h += 2) {
    const Pairs k0 = load_pairs(keys + h * kBlockLen), k1 = load_pairs(keys + h * kBlockLen + 32);
    if constexpr (kRows <= kPrefetchRows) {
      _mm_prefetch(reinterpret_cast<const char*>(next + h * kBlockLen), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next + h * kBlockLen + 32), _MM_HINT_T1);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs q = broadcast_pair(rows[r].query + h);
      s[r][0] = dot_bf16(s[r][0], k0, q);
      s[r][1] = dot_bf16(s[r][1], k1, q);
    }
  }
}

template <int kRows, int kVectors>
void add_values(const RowState* rows, const uint16_t* values, const uint16_t* next, int head_dim, int h, int pair_begin,
                int pair_end, const uint16_t (*probs)[kBlockLen], bool fresh) {
  Floats acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = fresh ? zero_floats() : load(rows[r].acc + h + v * 16);
  for (int pair = pair_begin; pair < pair_end; ++pair) {
    const uint16_t* place = values + (size_t(pair) * head_dim + h) * 2;
    Pairs line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      line[v] = load_pairs(place + v * 32);
      if constexpr (kRows <= kPrefetchRows)
        _mm_prefetch(reinterpret_cast<const char*>(next + (place - values) + v * 32), _MM_HINT_T1);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs p = broadcast_pair(probs[r] + pair * 2);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_bf16(acc[r][v], line[v], p);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(rows[r].acc + h + v * 16, acc[r][v]);
}

// What lies between a row's products with the keys of a page and its scores.
void cap_and_bias(const AttentionArgs& args, const RowState& row, int first_slot, Floats (&s)[2]) {
  if (args.soft_cap > 0.0f)
    for (Floats& half : s) half = soft_cap(half, args.soft_cap * kLog2E);
  if (row.slope == 0.0f) return;
  alignas(64) static constexpr float kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int v = 0; v < 2; ++v)
    s[v] = fma(add(load(kLanes), broadcast(float(first_slot + 16 * v - row.slot))), broadcast(row.slope), s[v]);
}

// One page for kRows rows: scores, running maximum, probabilities, values. `fresh`: the first of a span.
template <int kRows>
void sweep_page(const AttentionArgs& args, RowState* rows, const uint16_t* keys, const uint16_t* next, int first_slot,
                bool fresh) {
  const int head_dim = args.head_dim;
  Floats s[kRows][2];
  alignas(64) uint16_t probs[kRows][kBlockLen];
  scores<kRows>(rows, keys, next, head_dim, s);
  int begin = kBlockLen, end = 0;
  for (int r = 0; r < kRows; ++r) {
    RowState& row = rows[r];
    const int lo = std::max(0, row.lo - first_slot), hi = std::min(kBlockLen, row.hi - first_slot);
    if (lo >= hi) {
      store_bf16(probs[r], zero_floats(), zero_floats());
      continue;
    }
    begin = std::min(begin, lo);
    end = std::max(end, hi);
    cap_and_bias(args, row, first_slot, s[r]);
    const bool partial = lo > 0 || hi < kBlockLen;
    if (partial) {
      const Floats hidden = broadcast(-std::numeric_limits<float>::infinity());
      s[r][0] = select_range(s[r][0], hidden, lo, hi);
      s[r][1] = select_range(s[r][1], hidden, lo - 16, hi - 16);
    }
    const float largest = max_lanes(max(s[r][0], s[r][1]));
    if (largest > row.span.largest) {
      if (!row.span.empty) {
        const Floats shrink = exp2_nonpositive(broadcast(row.span.largest - largest));
        for (int h = 0; h < head_dim; h += 16) store(row.acc + h, mul(load(row.acc + h), shrink));
        row.span.total = mul(row.span.total, shrink);
      }
      row.span.largest = largest;
    }
    row.span.empty = false;
    Floats p0 = exp2_nonpositive(sub(s[r][0], broadcast(row.span.largest)));
    Floats p1 = exp2_nonpositive(sub(s[r][1], broadcast(row.span.largest)));
    if (partial) {
      p0 = select_range(p0, zero_floats(), lo, hi);
      p1 = select_range(p1, zero_floats(), lo - 16, hi - 16);
    }
    row.span.total = add(row.span.total, add(p0, p1));
    store_bf16(probs[r], p0, p1);
  }
  const uint16_t* values = keys + size_t(head_dim) * kBlockLen;
  const uint16_t* next_values = next + size_t(head_dim) * kBlockLen;
  int h = 0;
  for (; h + 64 <= head_dim; h += 64)
    add_values<kRows, 4>(rows, values, next_values, head_dim, h, begin / 2, (end + 1) / 2, probs, fresh);
  for (; h < head_dim; h += 16)
    add_values<kRows, 1>(rows, values, next_values, head_dim, h, begin / 2, (end + 1) / 2, probs, fresh);
}

void sweep_page(const AttentionArgs& args, RowState* rows, int num_rows, const uint16_t* keys, const uint16_t* next,
                int slot, bool fresh) {
  switch (num_rows) {
    case 1: return sweep_page<1>(args, rows, keys, next, slot, fresh);
    case 2: return sweep_page<2>(args, rows, keys, next, slot, fresh);
    case 3: return sweep_page<3>(args, rows, keys, next, slot, fresh);
    case 4: return sweep_page<4>(args, rows, keys, next, slot, fresh);
    case 5: return sweep_page<5>(args, rows, keys, next, slot, fresh);
    default: return sweep_page<6>(args, rows, keys, next, slot, fresh);
  }
}

// Sums up slots [begin, end), of one span, for up to kQueryRows rows; `after` is the page read after the last one.
void sum_span(const AttentionArgs& args, int seq, int kv_head, RowState* rows, int num_rows, int begin, int end,
              const uint16_t* after) {
  for (int i = 0; i < num_rows; ++i) rows[i].span = Sums();
  const int first_slot = begin / kBlockLen * kBlockLen;
  for (int slot = first_slot; slot < end; slot += kBlockLen) {
    const uint16_t* keys = page_of(args, seq, slot, kv_head);
    const uint16_t* next = slot + kBlockLen < end ? page_of(args, seq, slot + kBlockLen, kv_head) : after;
    for (int first = 0; first < num_rows; first += kMaxRows)
      sweep_page(args, rows + first, std::min(kMaxRows, num_rows - first), keys, next, slot, slot == first_slot);
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
class Tasks {
 public:
  Tasks(const AttentionArgs& args, const uint16_t* queries, const Pool& pool)
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
    const uint16_t* after = page_of(args_, args_.seqs[next.row_begin], next.span_begin(following.span), following.kv_head);
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
    return {queries_ + cell(run, kv_head, i), args_.slots[row], first_visible(args_, row), args_.kv_hi[row],
            slope * args_.alibi_scale * kLog2E, acc, {}};
  }

  int head_of(int kv_head, int i) const { return kv_head * group_ + i % group_; }
  const float* sink(int kv_head, int i) const { return args_.sinks ? args_.sinks + head_of(kv_head, i) : nullptr; }

  // All spans of query rows [first, end), at most kQueryRows, one after the other.
  void attend(const Run& run, int kv_head, int first, int end, const uint16_t* after) const {
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
      const uint16_t* next = span + 1 < num_spans ? page_of(args_, seq, run.span_end(span), kv_head) : after;
      sum_span(args_, seq, kv_head, rows, num_rows, run.span_begin(span), run.span_end(span), next);
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
  void leave_sums(const Run& run, const Place& at, int task, int first, int end, const uint16_t* after) const {
    RowState rows[kQueryRows];
    const size_t part = size_t(task) * max_rows_;
    for (int i = first; i < end; ++i)
      rows[i - first] = row_state(run, at.kv_head, i, part_values_ + (part + i) * args_.head_dim);
    sum_span(args_, args_.seqs[run.row_begin], at.kv_head, rows, end - first, run.span_begin(at.span),
               run.span_end(at.span), after);
    for (int i = first; i < end; ++i) parts_[part + i] = rows[i - first].span;
  }

  const AttentionArgs& args_;
  const uint16_t* queries_;  // [rows, heads, H]
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

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.num_rows == 0) return;
  Pool& pool = Pool::instance();
  auto* queries = static_cast<uint16_t*>(
      scratch_bytes<2>(sizeof(uint16_t) * args.num_rows * args.num_heads * args.head_dim));
  // All keys and values are written before any is read: a row may see others of the same call.
  // Sixteen tokens of a sequence share lines of the cache, which two threads should not both write.
  const int rows_per_chunk = std::clamp(args.num_rows / (2 * pool.num_threads()), 4, 16);
  pool.run((args.num_rows + rows_per_chunk - 1) / rows_per_chunk, [&](int chunk) {
    const int end = std::min(args.num_rows, (chunk + 1) * rows_per_chunk);
    for (int row = chunk * rows_per_chunk; row < end; ++row) enter_row(args, row, queries);
  });
  const Tasks tasks(args, queries, pool);
  pool.run(tasks.count(), tasks);
}

}  // namespace strop::STROP_ISA
