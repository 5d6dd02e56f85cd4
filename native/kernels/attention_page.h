// The pages of a kv head, for each type of stored number: how they lie in memory, how a token is written.
#pragma once

#include <cstddef>
#include <cstring>

#include "kernels/attention.h"
#include "simd/vec.h"

namespace strop::STROP_ISA {
namespace {

constexpr int kBlockLen = kAttentionBlockLen;

// Keys and values of one kv head in one block (see AttentionArgs). Item: uint16_t is bf16, int8_t a code.
template <class Item>
struct Page {
  static constexpr bool kQuantised = sizeof(Item) == 1;
  static constexpr int kStep = 4 / sizeof(Item);  // numbers of a token, or tokens of a dimension, that lie together

  uint8_t* data;
  int head_dim;

  static size_t numbers_bytes(int head_dim) { return size_t(head_dim) * kBlockLen * sizeof(Item); }
  static size_t half_bytes(int head_dim) { return numbers_bytes(head_dim) + (kQuantised ? kBlockLen * sizeof(float) : 0); }

  // Of the dimensions from h on, a multiple of kStep: kStep of each token.
  Item* keys(int h) const { return reinterpret_cast<Item*>(data) + h * kBlockLen; }
  // Of the tokens from `in` on, a multiple of kStep: kStep of each dimension.
  Item* values(int in) const { return reinterpret_cast<Item*>(data + half_bytes(head_dim)) + size_t(in) * head_dim; }
  float* key_scales() const { return reinterpret_cast<float*>(data + numbers_bytes(head_dim)); }
  float* value_scales() const { return reinterpret_cast<float*>(data + half_bytes(head_dim) + numbers_bytes(head_dim)); }
};

template <class Item>
Page<Item> page_of(const AttentionArgs& args, int seq, int slot, int kv_head) {
  const size_t block = args.block_tables[size_t(seq) * args.table_len + slot / kBlockLen];
  const size_t page = (block * args.num_kv_heads + kv_head) * 2 * Page<Item>::half_bytes(args.head_dim);
  return {args.cache + page, args.head_dim};
}

void narrow(const float* x, int len, float factor, uint16_t* out) {
  int i = 0;
  for (; i + 32 <= len; i += 32)
    store_bf16(out + i, mul(load(x + i), broadcast(factor)), mul(load(x + i + 16), broadcast(factor)));
  for (; i < len; ++i) out[i] = float_to_bf16(x[i] * factor);
}

// Codes of x and their scale, absmax / 127.
float quantise(const float* x, int len, int8_t* codes) {
  Floats most = zero_floats();
  for (int h = 0; h < len; h += 16) most = max(most, abs(load(x + h)));
  const float largest = max_lanes(most), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int h = 0; h < len; h += 16) store_int8(codes + h, to_ints(mul(load(x + h), broadcast(inverse))));
  return largest / 127.0f;
}

// A query as the products take it, made from `factor` times x; it takes kQueryBytes per dimension.
constexpr int kQueryBytes = 2;
struct QuantisedQuery {
  const int8_t* codes;
  float scale;
  int32_t zero_sum;  // -128 * sum of codes, for the 128 that keys have on top

  static QuantisedQuery at(const uint8_t* query, int head_dim) {
    QuantisedQuery q{reinterpret_cast<const int8_t*>(query), 0, 0};
    std::memcpy(&q.scale, query + head_dim, 4);
    std::memcpy(&q.zero_sum, query + head_dim + 4, 4);
    return q;
  }
};

template <class Item>
void write_query(const float* x, int head_dim, float factor, uint8_t* query) {
  if constexpr (!Page<Item>::kQuantised) return narrow(x, head_dim, factor, reinterpret_cast<uint16_t*>(query));
  auto* codes = reinterpret_cast<int8_t*>(query);
  const float scale = quantise(x, head_dim, codes) * factor;
  int32_t zero_sum = 0;
  for (int h = 0; h < head_dim; ++h) zero_sum -= 128 * codes[h];
  std::memcpy(query + head_dim, &scale, 4);
  std::memcpy(query + head_dim + 4, &zero_sum, 4);
}

// Writes the token at `in`. `partner_follows`: so will the next one be, in this call.
void write(const Page<uint16_t>& page, int in, const float* key, const float* value, bool partner_follows) {
  alignas(64) uint16_t narrowed[kMaxHeadDim];
  narrow(key, page.head_dim, 1.0f, narrowed);
  for (int h = 0; h < page.head_dim; h += 2)
    std::memcpy(page.keys(h) + in * 2, narrowed + h, 4);
  narrow(value, page.head_dim, 1.0f, narrowed);
  uint16_t* place = page.values(in / 2 * 2);
  if (in % 2 == 1) {
    for (int h = 0; h < page.head_dim; ++h) place[h * 2 + 1] = narrowed[h];
  } else if (partner_follows) {
    for (int h = 0; h < page.head_dim; ++h) place[h * 2] = narrowed[h];
  } else {  // the pair's other half may hold anything: 0 keeps 0 x stale from becoming NaN
    for (int h = 0; h < page.head_dim; ++h) {
      const uint32_t pair = narrowed[h];
      std::memcpy(place + h * 2, &pair, 4);
    }
  }
}

void write(const Page<int8_t>& page, int in, const float* key, const float* value, bool) {
  alignas(64) int8_t codes[kMaxHeadDim];
  page.key_scales()[in] = quantise(key, page.head_dim, codes);
  for (int h = 0; h < page.head_dim; h += 4)
    for (int i = 0; i < 4; ++i) page.keys(h)[in * 4 + i] = int8_t(codes[h + i] ^ 0x80);  // + 128
  page.value_scales()[in] = quantise(value, page.head_dim, codes);
  int8_t* place = page.values(in / 4 * 4) + in % 4;
  for (int h = 0; h < page.head_dim; ++h) place[h * 4] = codes[h];
}

}  // namespace
}  // namespace strop::STROP_ISA
