// Rotation, cache write and attention in one call. A row's result depends only on its query and on the cache pages it
// sees, swept page by page from the first: never on the rows that share the call, the block of rows it falls into, or
// the threads. Scores and sums accumulate in float32; queries, keys, values and unnormalised probabilities are bf16.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/scratch.h"
#include "simd/vec.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {
namespace {

constexpr int kBlockLen = kAttentionBlockLen;
constexpr int kMaxRows = 6;    // rows in one register block: 6 x 4 accumulators of head dimensions
constexpr int kQueryRows = 12;  // rows (queries x heads of a group) in one task
constexpr int kPrefetchRows = 4;  // a few rows wait for the pages; many find them in the cache already

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

// Rotates row's query into `queries` (scaled, so that a score is a power of two) and writes its key and value.
void enter_row(const AttentionArgs& args, int row, uint16_t* queries) {
  const int head_dim = args.head_dim, num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
  const float* x = args.qkv + size_t(row) * (num_heads + 2 * num_kv_heads) * head_dim;
  const int position = args.positions[row], slot = args.slots[row], in = slot % kBlockLen;
  float turned[512];
  alignas(64) uint16_t narrowed[512];
  for (int head = 0; head < num_heads; ++head) {
    rotate(args, position, x + head * head_dim, turned);
    narrow(turned, head_dim, args.scale * 1.44269504f, queries + (size_t(row) * num_heads + head) * head_dim);
  }
  const bool partner_follows =
      row + 1 < args.num_rows && args.seqs[row + 1] == args.seqs[row] && args.slots[row + 1] == slot + 1;
  for (int head = 0; head < num_kv_heads; ++head) {
    uint16_t* keys = page_of(args, args.seqs[row], slot, head);
    uint16_t* values = keys + size_t(head_dim) * kBlockLen;
    rotate(args, position, x + (num_heads + head) * head_dim, turned);
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

struct RowState {
  const uint16_t* query;
  float* acc;  // [H]
  float* y;    // [H]
  int lo, hi;
  float largest;
  Floats total;
};

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
                int pair_end, const uint16_t (*probs)[kBlockLen]) {
  Floats acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(rows[r].acc + h + v * 16);
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

// One page for kRows rows: scores, running maximum, probabilities, values.
template <int kRows>
void sweep_page(RowState* rows, const uint16_t* keys, const uint16_t* next, int head_dim, int first_slot) {
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
    const bool partial = lo > 0 || hi < kBlockLen;
    if (partial) {
      const Floats hidden = broadcast(-std::numeric_limits<float>::infinity());
      s[r][0] = select_range(s[r][0], hidden, lo, hi);
      s[r][1] = select_range(s[r][1], hidden, lo - 16, hi - 16);
    }
    const float largest = max_lanes(max(s[r][0], s[r][1]));
    if (largest > row.largest) {
      const Floats shrink = exp2_nonpositive(broadcast(row.largest - largest));
      for (int h = 0; h < head_dim; h += 16) store(row.acc + h, mul(load(row.acc + h), shrink));
      row.total = mul(row.total, shrink);
      row.largest = largest;
    }
    Floats p0 = exp2_nonpositive(sub(s[r][0], broadcast(row.largest)));
    Floats p1 = exp2_nonpositive(sub(s[r][1], broadcast(row.largest)));
    if (partial) {
      p0 = select_range(p0, zero_floats(), lo, hi);
      p1 = select_range(p1, zero_floats(), lo - 16, hi - 16);
    }
    row.total = add(row.total, add(p0, p1));
    store_bf16(probs[r], p0, p1);
  }
  const uint16_t* values = keys + size_t(head_dim) * kBlockLen;
  const uint16_t* next_values = next + size_t(head_dim) * kBlockLen;
  int h = 0;
  for (; h + 64 <= head_dim; h += 64)
    add_values<kRows, 4>(rows, values, next_values, head_dim, h, begin / 2, (end + 1) / 2, probs);
  for (; h < head_dim; h += 16)
    add_values<kRows, 1>(rows, values, next_values, head_dim, h, begin / 2, (end + 1) / 2, probs);
}

void sweep_page(RowState* rows, int num_rows, const uint16_t* keys, const uint16_t* next, int head_dim, int slot) {
  switch (num_rows) {
    case 1: return sweep_page<1>(rows, keys, next, head_dim, slot);
    case 2: return sweep_page<2>(rows, keys, next, head_dim, slot);
    case 3: return sweep_page<3>(rows, keys, next, head_dim, slot);
    case 4: return sweep_page<4>(rows, keys, next, head_dim, slot);
    case 5: return sweep_page<5>(rows, keys, next, head_dim, slot);
    default: return sweep_page<6>(rows, keys, next, head_dim, slot);
  }
}

// Queries [row_begin, row_end) of one sequence against one kv head; `after` is the page read after the last one.
void attend(const AttentionArgs& args, const uint16_t* queries, int row_begin, int row_end, int kv_head,
            const uint16_t* after) {
  const int head_dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const int seq = args.seqs[row_begin];
  const int total = (row_end - row_begin) * group;
  auto* acc = static_cast<float*>(scratch_bytes<3>(sizeof(float) * kQueryRows * head_dim));
  for (int base = 0; base < total; base += kQueryRows) {
    RowState rows[kQueryRows];
    const int num_rows = std::min(kQueryRows, total - base);
    int lo = std::numeric_limits<int>::max(), hi = 0;
    for (int i = 0; i < num_rows; ++i) {
      const int row = row_begin + (base + i) / group, head = kv_head * group + (base + i) % group;
      const size_t at = (size_t(row) * args.num_heads + head) * head_dim;
      rows[i] = {queries + at, acc + size_t(i) * head_dim, args.y + at, args.kv_lo[row], args.kv_hi[row],
                 -std::numeric_limits<float>::infinity(), zero_floats()};
      lo = std::min(lo, rows[i].lo);
      hi = std::max(hi, rows[i].hi);
    }
    std::memset(acc, 0, sizeof(float) * num_rows * head_dim);
    for (int slot = lo / kBlockLen * kBlockLen; slot < hi; slot += kBlockLen) {
      const uint16_t* keys = page_of(args, seq, slot, kv_head);
      const uint16_t* next = slot + kBlockLen < hi ? page_of(args, seq, slot + kBlockLen, kv_head) : after;
      for (int first = 0; first < num_rows; first += kMaxRows)
        sweep_page(rows + first, std::min(kMaxRows, num_rows - first), keys, next, head_dim, slot);
    }
    for (int i = 0; i < num_rows; ++i) {
      const float weight = sum_lanes(rows[i].total);
      const Floats inverse = broadcast(weight > 0.0f ? 1.0f / weight : 0.0f);
      for (int h = 0; h < head_dim; h += 16) store(rows[i].y + h, mul(load(rows[i].acc + h), inverse));
    }
  }
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.num_rows == 0) return;
  Pool& pool = Pool::instance();
  auto* queries = static_cast<uint16_t*>(
      scratch_bytes<2>(sizeof(uint16_t) * args.num_rows * args.num_heads * args.head_dim));
  constexpr int kRowsPerChunk = 16;
  pool.run((args.num_rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int chunk) {
    const int end = std::min(args.num_rows, (chunk + 1) * kRowsPerChunk);
    for (int row = chunk * kRowsPerChunk; row < end; ++row) enter_row(args, row, queries);
  });

  // Tasks: runs of rows of one sequence, times kv heads; the last rows see most, so they go first.
  const int group = args.num_heads / args.num_kv_heads;
  const int max_run = std::max(1, kQueryRows / group);
  auto* begins = static_cast<int*>(scratch_bytes<4>(sizeof(int) * (args.num_rows + 1)));
  int num_runs = 0;
  for (int row = 0; row < args.num_rows; ++num_runs) {
    begins[num_runs] = row;
    const int start = row;
    do ++row;
    while (row < args.num_rows && row - start < max_run && args.seqs[row] == args.seqs[start]);
  }
  begins[num_runs] = args.num_rows;
  const int num_tasks = num_runs * args.num_kv_heads;
  pool.run(num_tasks, [&](int task) {
    const auto run_of = [&](int t) { return num_runs - 1 - t / args.num_kv_heads; };
    const int following = std::min(task + 1, num_tasks - 1), next_row = begins[run_of(following)];
    const uint16_t* after =
        page_of(args, args.seqs[next_row], args.kv_lo[next_row], following % args.num_kv_heads);
    const int begin = begins[run_of(task)], end = begins[run_of(task) + 1];
    attend(args, queries, begin, end, task % args.num_kv_heads, after);
  });
}

}  // namespace strop::STROP_ISA
