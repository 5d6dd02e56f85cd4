// The softmax's running sums of some rows over a page, and how sums are joined.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/attention_page.h"

namespace strop::STROP_ISA {
namespace {

constexpr int kMaxRows = 6;  // rows in one register block: 6 x 4 accumulators of head dimensions
constexpr int kPrefetchRows = 4;  // a few rows wait for the pages; many find them in the cache already
constexpr float kLog2E = 1.44269504f;  // scores are powers of two in here

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

template <int kRows, class Item>
void scores(const RowState* rows, const Page<Item>& page, const uint8_t* next, Floats (*s)[2]) {
  const Item* keys = page.keys();
  for (int r = 0; r < kRows; ++r) s[r][0] = s[r][1] = zero_floats();
  for (int h = 0; h < page.head_dim; h += 2) {
    const Pairs k0 = load_pairs(keys + h * kBlockLen), k1 = load_pairs(keys + h * kBlockLen + 32);
    if constexpr (kRows <= kPrefetchRows) {
      for (int line = 0; line < Page<Item>::kLinesPerStep; ++line, next += 64)
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs q = broadcast_pair(rows[r].query + h);
      s[r][0] = dot_bf16(s[r][0], k0, q);
      s[r][1] = dot_bf16(s[r][1], k1, q);
    }
  }
  if constexpr (Page<Item>::kQuantised)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) s[r][v] = mul(s[r][v], load(page.key_scales() + 16 * v));
}

template <int kRows, int kVectors, class Item>
void add_values(const RowState* rows, const Page<Item>& page, const uint8_t* next, int h, int pair_begin, int pair_end,
                const uint16_t (*probs)[kBlockLen], bool fresh) {
  Floats acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = fresh ? zero_floats() : load(rows[r].acc + h + v * 16);
  for (int pair = pair_begin; pair < pair_end; ++pair) {
    const size_t at = (size_t(pair) * page.head_dim + h) * 2;
    const Item* place = page.values() + at;
    Pairs line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      line[v] = load_pairs(place + v * 32);
      if (kRows <= kPrefetchRows && (v * sizeof(Item)) % 2 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(next + (at + v * 32) * sizeof(Item)), _MM_HINT_T1);
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
template <int kRows, class Item>
void sweep_page(const AttentionArgs& args, RowState* rows, const Page<Item>& page, const uint8_t* next, int first_slot,
                bool fresh) {
  const int head_dim = args.head_dim;
  Floats s[kRows][2];
  alignas(64) uint16_t probs[kRows][kBlockLen];
  scores<kRows>(rows, page, next, s);
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
    if constexpr (Page<Item>::kQuantised) {  // a hidden token's scale may be anything
      const Floats shares[2] = {p0, p1};
      p0 = select_range(mul(shares[0], load(page.value_scales())), zero_floats(), lo, hi);
      p1 = select_range(mul(shares[1], load(page.value_scales() + 16)), zero_floats(), lo - 16, hi - 16);
    }
    store_bf16(probs[r], p0, p1);
  }
  const uint8_t* next_values = next + Page<Item>::half_bytes(head_dim);
  int h = 0;
  for (; h + 64 <= head_dim; h += 64)
    add_values<kRows, 4>(rows, page, next_values, h, begin / 2, (end + 1) / 2, probs, fresh);
  for (; h < head_dim; h += 16)
    add_values<kRows, 1>(rows, page, next_values, h, begin / 2, (end + 1) / 2, probs, fresh);
}

template <class Item>
void sweep_page(const AttentionArgs& args, RowState* rows, int num_rows, const Page<Item>& page, const uint8_t* next,
                int slot, bool fresh) {
  switch (num_rows) {
    case 1: return sweep_page<1>(args, rows, page, next, slot, fresh);
    case 2: return sweep_page<2>(args, rows, page, next, slot, fresh);
    case 3: return sweep_page<3>(args, rows, page, next, slot, fresh);
    case 4: return sweep_page<4>(args, rows, page, next, slot, fresh);
    case 5: return sweep_page<5>(args, rows, page, next, slot, fresh);
    default: return sweep_page<6>(args, rows, page, next, slot, fresh);
  }
}

}  // namespace
}  // namespace strop::STROP_ISA
