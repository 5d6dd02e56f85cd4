#include <sys/mman.h>

#include "ffi/buffers.h"

namespace strop {
namespace {

enum Row { kPosition = 1, kSlot, kLo, kHi, kSeq, kNumRowFields };  // field 0 is the token

// Every index the kernel will follow, checked once per step's rows.
bool rows_are_sound(const AttentionArgs& a, int64_t num_blocks, int64_t num_positions, int64_t num_seqs) {
  const int64_t capacity = int64_t(a.table_len) * a.block_len;
  for (int row = 0; row < a.num_rows; ++row) {
    if (a.seqs[row] < 0 || a.seqs[row] >= num_seqs) return false;
    if (a.slots[row] < 0 || a.slots[row] >= capacity || a.positions[row] < 0 || a.positions[row] >= num_positions) return false;
    if (a.kv_lo[row] < 0 || a.kv_lo[row] >= a.kv_hi[row] || a.kv_hi[row] > capacity) return false;
    const int last = (a.kv_hi[row] > a.slots[row] ? a.kv_hi[row] - 1 : a.slots[row]) / a.block_len;
    if (row > 0 && a.seqs[row] == a.seqs[row - 1] && last <= a.slots[row - 1] / a.block_len) continue;
    const int32_t* table = a.block_tables + int64_t(a.seqs[row]) * a.table_len;
    for (int i = 0; i <= last; ++i)
      if (table[i] < 0 || table[i] >= num_blocks) return false;
  }
  return true;
}

ffi::Error attention(ffi::Buffer<ffi::F32> qkv, ffi::Buffer<ffi::BF16> cache, ffi::Buffer<ffi::S32> rows,
                     ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::F32> cosine, ffi::Buffer<ffi::F32> sine,
                     ffi::Buffer<ffi::S32> counts, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::BF16> cache_out,
                     int32_t layer, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t rotary_dim,
                     float scale) {
  const auto shape = cache.dimensions();  // [L, P, K, 2, block_len * H]
  AttentionArgs a{};
  if (!bounded(counts, 0, qkv.dimensions()[0], &a.num_rows)) return invalid("attention: bad row count");
  if (shape.size() != 5 || layer < 0 || layer >= shape[0] || shape[2] != num_kv_heads || shape[3] != 2)
    return invalid("attention: the cache needs shape [L, P, K, 2, block_len * H]");
  if (cache.typed_data() != cache_out->typed_data()) return invalid("attention: the cache must be donated");
  if (head_dim > 512 || num_kv_heads <= 0 || num_heads % num_kv_heads != 0) return invalid("attention: bad heads");
  const int64_t num_rows = qkv.dimensions()[0];
  if (qkv.dimensions()[1] != int64_t(num_heads + 2 * num_kv_heads) * head_dim ||
      int64_t(y->element_count()) != num_rows * num_heads * head_dim || int64_t(rows.element_count()) != kNumRowFields * num_rows)
    return invalid("attention: shapes of qkv, rows and y disagree");
  a.qkv = qkv.typed_data();
  a.cache = reinterpret_cast<uint16_t*>(cache_out->typed_data()) + shape[1] * shape[2] * 2 * shape[4] * layer;
  const int32_t* field = rows.typed_data();
  a.positions = field + kPosition * num_rows, a.slots = field + kSlot * num_rows, a.kv_lo = field + kLo * num_rows;
  a.kv_hi = field + kHi * num_rows, a.seqs = field + kSeq * num_rows;
  a.block_tables = tables.typed_data();
  a.table_len = int(tables.dimensions()[1]), a.block_len = int(shape[4] / head_dim);
  a.num_heads = num_heads, a.num_kv_heads = num_kv_heads, a.head_dim = head_dim, a.rotary_dim = rotary_dim;
  int64_t num_positions = int64_t(1) << 40;
  if (rotary_dim > 0) {
    if (cosine.dimensions().size() != 2 || cosine.dimensions()[1] * 2 != rotary_dim || !same(sine.dimensions(), cosine.dimensions()))
      return invalid("attention: bad rope tables");
    a.rope_cos = cosine.typed_data(), a.rope_sin = sine.typed_data();
    num_positions = cosine.dimensions()[0];
  }
  a.scale = scale, a.y = y->typed_data();
  if (!rows_are_sound(a, shape[1], num_positions, tables.dimensions()[0])) return invalid("attention: a row points outside the cache");
  kernels().attention(a);
  return ffi::Error::Success();
}

// An array nobody writes: fresh pages cost nothing until a sequence uses them. The kernels never read what they did
// not write. Huge pages, where the system grants them: sequences' pages lie scattered, and each would miss the TLB.
ffi::Error allocate(ffi::ResultBuffer<ffi::BF16> cache) {
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(cache->typed_data()), end = begin + cache->size_bytes();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: failure is fine
  return ffi::Error::Success();
}

}  // namespace
}  // namespace strop

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_allocate, strop::allocate,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::Buffer<xla::ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_attention, strop::attention, xla::ffi::Ffi::Bind()
    .Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::BF16>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Arg<xla::ffi::Buffer<xla::ffi::S32>>().Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::F32>>()
    .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Ret<xla::ffi::Buffer<xla::ffi::F32>>().Ret<xla::ffi::Buffer<xla::ffi::BF16>>()
    .Attr<int32_t>("layer").Attr<int32_t>("num_heads").Attr<int32_t>("num_kv_heads").Attr<int32_t>("head_dim")
    .Attr<int32_t>("rotary_dim").Attr<float>("scale"));
