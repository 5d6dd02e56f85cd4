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
  static constexpr int kLinesPerStep = 2 * kBlockLen * sizeof(Item) / 64;  // of two head dimensions of all tokens

  uint8_t* data;
  int head_dim;

  static size_t codes_bytes(int head_dim) { return size_t(head_dim) * kBlockLen * sizeof(Item); }
  static size_t half_bytes(int head_dim) { return codes_bytes(head_dim) + (kQuantised ? kBlockLen * sizeof(float) : 0); }

  Item* keys() const { return reinterpret_cast<Item*>(data); }
  Item* values() const { return reinterpret_cast<Item*>(data + half_bytes(head_dim)); }
  float* key_scales() const { return reinterpret_cast<float*>(data + codes_bytes(head_dim)); }
  float* value_scales() const { return reinterpret_cast<float*>(data + half_bytes(head_dim) + codes_bytes(head_dim)); }
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

// Writes the token at `in`. `partner_follows`: so will the next one be, in this call.
void write(const Page<uint16_t>& page, int in, const float* key, const float* value, bool partner_follows) {
  alignas(64) uint16_t narrowed[kMaxHeadDim];
  narrow(key, page.head_dim, 1.0f, narrowed);
  for (int h = 0; h < page.head_dim; h += 2)
    std::memcpy(page.keys() + (h / 2 * kBlockLen + in) * 2, narrowed + h, 4);
  narrow(value, page.head_dim, 1.0f, narrowed);
  uint16_t* place = page.values() + size_t(in / 2) * page.head_dim * 2;
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
  for (int h = 0; h < page.head_dim; h += 2) std::memcpy(page.keys() + (h / 2 * kBlockLen + in) * 2, codes + h, 2);
  page.value_scales()[in] = quantise(value, page.head_dim, codes);
  int8_t* place = page.values() + size_t(in / 2) * page.head_dim * 2 + in % 2;
  for (int h = 0; h < page.head_dim; ++h) place[h * 2] = codes[h];
}

}  // namespace
}  // namespace strop::STROP_ISA
