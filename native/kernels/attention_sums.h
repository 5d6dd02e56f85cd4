// The softmax's running sums of some rows over a page, and how sums are joined.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/attention_page.h"

namespace strop::STROP_ISA {
namespace {

constexpr int kMaxRows = 6;  // rows in one register block: 6 x 4 accumulators of head dimensions
constexpr int kAlwaysFetchRows = 4;  // so few rows always wait for the pages
constexpr float kLog2E = 1.44269504f;  // scores are powers of two in here

// A softmax's sums over some slots; the weighted values [H] lie beside it.
struct Sums {
  float largest = -std::numeric_limits<float>::infinity();
  bool empty = true;  // no slot was seen; scores that are not numbers are not nothing
  Floats total = zero_floats();
};

struct RowState {
  const uint8_t* query;
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

// The page that will be read next is fetched a line at a time, as this one is used up.
void fetch(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1); }

template <int kRows, bool kFetch>
void scores(const RowState* rows, const Page<uint16_t>& page, const uint8_t* next, Floats (*s)[2]) {
  for (int r = 0; r < kRows; ++r) s[r][0] = s[r][1] = zero_floats();
  for (int h = 0; h < page.head_dim; h += 2) {
    const Pairs k0 = load_pairs(page.keys(h)), k1 = load_pairs(page.keys(h) + 32);
    if constexpr (kFetch) fetch(next + h * 64), fetch(next + h * 64 + 64);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs q = broadcast_pair(reinterpret_cast<const uint16_t*>(rows[r].query) + h);
      s[r][0] = dot_bf16(s[r][0], k0, q);
      s[r][1] = dot_bf16(s[r][1], k1, q);
    }
  }
}

template <int kRows, bool kFetch>
void scores(const RowState* rows, const Page<int8_t>& page, const uint8_t* next, Floats (*s)[2]) {
  Ints dot[kRows][2];
  const int8_t* codes[kRows];
  for (int r = 0; r < kRows; ++r) {
    const auto query = QuantisedQuery::at(rows[r].query, page.head_dim);
    codes[r] = query.codes;
    dot[r][0] = dot[r][1] = broadcast_int(query.zero_sum);
  }
  for (int h = 0; h < page.head_dim; h += 4) {
    const Bytes k0 = load_bytes(page.keys(h)), k1 = load_bytes(page.keys(h) + 64);
    if constexpr (kFetch) fetch(next + h * 32), fetch(next + h * 32 + 64);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Bytes q = broadcast_four(codes[r] + h);
      dot[r][0] = dot_bytes(dot[r][0], k0, q);
      dot[r][1] = dot_bytes(dot[r][1], k1, q);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Floats scale = broadcast(QuantisedQuery::at(rows[r].query, page.head_dim).scale);
    for (int v = 0; v < 2; ++v) s[r][v] = mul(to_floats(dot[r][v]), mul(load(page.key_scales() + 16 * v), scale));
  }
}

// Unnormalised probabilities of one row over a page, as the products with values take them.
template <class Item>
struct Shares;

template <>
struct Shares<uint16_t> {
  alignas(64) uint16_t shares[kBlockLen];

  void store(Floats p0, Floats p1) { store_bf16(shares, p0, p1); }
};

template <>
struct Shares<int8_t> {
  alignas(64) uint8_t shares[kBlockLen];
  float scale;

  void store(Floats p0, Floats p1) {
    const float largest = max_lanes(max(p0, p1)), inverse = largest > 0.0f ? 255.0f / largest : 0.0f;
    store_uint8(shares, to_ints(mul(p0, broadcast(inverse))));
    store_uint8(shares + 16, to_ints(mul(p1, broadcast(inverse))));
    scale = largest / 255.0f;
  }
};

// Values of tokens [begin, end) and dimensions [h, h + 16 kVectors), weighted, on top of what the rows have.
template <int kRows, int kVectors, bool kFetch>
void add_values(const RowState* rows, const Page<uint16_t>& page, const uint8_t* next, int h, int begin, int end,
                const Shares<uint16_t>* shares, bool fresh) {
  Floats acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = fresh ? zero_floats() : load(rows[r].acc + h + v * 16);
  for (int in = begin / 2 * 2; in < end; in += 2) {
    Pairs line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      line[v] = load_pairs(page.values(in) + h * 2 + v * 32);
      if constexpr (kFetch) fetch(next + (size_t(in) * page.head_dim + h * 2 + v * 32) * 2);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs p = broadcast_pair(shares[r].shares + in);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_bf16(acc[r][v], line[v], p);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(rows[r].acc + h + v * 16, acc[r][v]);
}

template <int kRows, int kVectors, bool kFetch>
void add_values(const RowState* rows, const Page<int8_t>& page, const uint8_t* next, int h, int begin, int end,
                const Shares<int8_t>* shares, bool fresh) {
  Ints sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zero_ints();
  for (int in = begin / 4 * 4; in < end; in += 4) {
    Bytes line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      line[v] = load_bytes(page.values(in) + h * 4 + v * 64);
      if constexpr (kFetch) fetch(next + size_t(in) * page.head_dim + h * 4 + v * 64);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Bytes p = broadcast_four(shares[r].shares + in);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = dot_bytes(sums[r][v], p, line[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* acc = rows[r].acc + h + v * 16;
      store(acc, fma(to_floats(sums[r][v]), broadcast(shares[r].scale), fresh ? zero_floats() : load(acc)));
    }
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
template <int kRows, bool kFetch, class Item>
void sweep_page(const AttentionArgs& args, RowState* rows, const Page<Item>& page, const uint8_t* next, int first_slot,
                bool fresh) {
  const int head_dim = args.head_dim;
  Floats s[kRows][2];
  Shares<Item> shares[kRows];
  if constexpr (Page<Item>::kQuantised && kFetch)
    for (int line = 0; line < 2; ++line) {  // of scales
      const uint8_t* scales = next + Page<Item>::numbers_bytes(head_dim) + line * 64;
      fetch(scales), fetch(scales + Page<Item>::half_bytes(head_dim));
    }
  scores<kRows, kFetch>(rows, page, next, s);
  int begin = kBlockLen, end = 0;
  for (int r = 0; r < kRows; ++r) {
    RowState& row = rows[r];
    const int lo = std::max(0, row.lo - first_slot), hi = std::min(kBlockLen, row.hi - first_slot);
    if (lo >= hi) {
      shares[r].store(zero_floats(), zero_floats());
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
      p0 = select_range(mul(p0, load(page.value_scales())), zero_floats(), lo, hi);
      p1 = select_range(mul(p1, load(page.value_scales() + 16)), zero_floats(), lo - 16, hi - 16);
    }
    shares[r].store(p0, p1);
  }
  const uint8_t* next_values = next + Page<Item>::half_bytes(head_dim);
  int h = 0;
  for (; h + 64 <= head_dim; h += 64)
    add_values<kRows, 4, kFetch>(rows, page, next_values, h, begin, end, shares, fresh);
  for (; h < head_dim; h += 16)
    add_values<kRows, 1, kFetch>(rows, page, next_values, h, begin, end, shares, fresh);
}

template <int kRows, class Item>
void sweep_page(const AttentionArgs& args, RowState* rows, const Page<Item>& page, const uint8_t* next, int slot,
                bool fresh, bool fetches) {
  if (kRows <= kAlwaysFetchRows || fetches) return sweep_page<kRows, true>(args, rows, page, next, slot, fresh);
  sweep_page<kRows, kRows <= kAlwaysFetchRows>(args, rows, page, next, slot, fresh);
}

template <class Item>
void sweep_page(const AttentionArgs& args, RowState* rows, int num_rows, const Page<Item>& page, const uint8_t* next,
                int slot, bool fresh, bool fetches) {
  switch (num_rows) {
    case 1: return sweep_page<1>(args, rows, page, next, slot, fresh, fetches);
    case 2: return sweep_page<2>(args, rows, page, next, slot, fresh, fetches);
    case 3: return sweep_page<3>(args, rows, page, next, slot, fresh, fetches);
    case 4: return sweep_page<4>(args, rows, page, next, slot, fresh, fetches);
    case 5: return sweep_page<5>(args, rows, page, next, slot, fresh, fetches);
    default: return sweep_page<6>(args, rows, page, next, slot, fresh, fetches);
  }
}

}  // namespace
}  // namespace strop::STROP_ISA
