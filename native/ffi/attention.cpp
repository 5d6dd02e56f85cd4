#include <sys/mman.h>

#include "ffi/operations.h"

namespace strop {
namespace {

enum Row { kPosition = 1, kSlot, kLo, kHi, kSeq, kNumRowFields };  // field 0 is the token

// Every index the kernel will follow, checked once per step's rows. Table entries before a row's window are the null
// block, which is in range like any other.
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

bool same_rows(const AttentionArgs& a, const AttentionArgs& b) {
  return a.positions == b.positions && a.kv_lo == b.kv_lo && a.block_tables == b.block_tables &&
         a.table_len == b.table_len && a.num_rows == b.num_rows && a.rope_cos == b.rope_cos;
}

// Whether it is of each head, or of all together, or none.
bool norms_heads(const NormArgs& norm, int num_heads, int head_dim) {
  if (norm.weight == nullptr) return true;
  if (norm.num_pieces > 1) return norm.num_pieces == num_heads && norm.len == head_dim;
  return norm.len == head_dim || norm.len == int64_t(num_heads) * head_dim;
}

// An array nobody writes: fresh pages cost nothing until a sequence uses them. The kernels never read what they did
// not write. Huge pages, where the system grants them: sequences' pages lie scattered, and each would miss the TLB.
ffi::Error allocate(ffi::Result<ffi::AnyBuffer> cache) {
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(cache->untyped_data()), end = begin + cache->size_bytes();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: failure is fine
  return ffi::Error::Success();
}

}  // namespace

// qkv, cache [L, P, K, 2, page], row fields, block tables, counts, [cos, sin], [sinks], [norm of queries], [norm of
// keys], y. The cache is written in place.
ffi::Error Attention::decode(Operands& operands) {
  AttentionArgs& a = args;
  const auto qkv = operands.next<ffi::F32>();
  a.quantised = operands.attr();
  const Tensor cache = operands.next_of(a.quantised ? ffi::U8 : ffi::BF16);
  const auto fields = operands.next<ffi::S32>(), tables = operands.next<ffi::S32>(), counts = operands.next<ffi::S32>();
  const int layer = operands.attr();
  a.num_heads = operands.attr(), a.num_kv_heads = operands.attr(), a.head_dim = operands.attr();
  a.rotary_dim = operands.attr();
  a.scale = operands.float_attr(), a.soft_cap = operands.float_attr(), a.alibi_scale = operands.float_attr();
  a.window_len = operands.attr();
  const int sinks_row = operands.attr();  // -1: none
  const bool has_sinks = sinks_row >= 0;
  const auto cosine = a.rotary_dim > 0 ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto sine = a.rotary_dim > 0 ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto sinks = has_sinks ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const bool norms_are_sound = take_norm(operands, &a.q_norm) && take_norm(operands, &a.k_norm);
  const auto y = operands.result<ffi::F32>();
  if (!operands.all_taken()) return invalid("attention: operands of other number or type than expected");
  if (qkv.dims.size() != 2 || tables.dims.size() != 2 || !rows.bind(counts, 0, qkv.dims[0]))
    return invalid("attention: no such row count");
  if (cache.dims.size() != 5 || layer < 0 || layer >= cache.dims[0] || cache.dims[2] != a.num_kv_heads || cache.dims[3] != 2)
    return invalid("attention: the cache needs shape [L, P, K, 2, page]");
  if (a.head_dim < 16 || a.head_dim > kMaxHeadDim || a.head_dim % 16 != 0 || a.num_kv_heads <= 0 ||
      a.num_heads % a.num_kv_heads != 0 || a.rotary_dim < 0 || a.rotary_dim > a.head_dim)
    return invalid("attention: bad heads");
  // Codes are followed by a float scale per token.
  if (cache.dims[4] != int64_t(kAttentionBlockLen) * (a.head_dim + (a.quantised ? 4 : 0)))
    return invalid("attention: bad block length");
  const int64_t max_rows = qkv.dims[0];
  if (qkv.dims[1] != int64_t(a.num_heads + 2 * a.num_kv_heads) * a.head_dim ||
      y.count() != max_rows * a.num_heads * a.head_dim || fields.count() != kNumRowFields * max_rows)
    return invalid("attention: shapes of qkv, rows and y disagree");
  a.qkv = qkv.data;
  const int64_t layer_len = cache.dims[1] * cache.dims[2] * 2 * cache.dims[4];
  a.cache = static_cast<uint8_t*>(cache.data) + layer_len * (a.quantised ? 1 : 2) * layer;
  a.positions = fields.data + kPosition * max_rows, a.slots = fields.data + kSlot * max_rows;
  a.kv_lo = fields.data + kLo * max_rows, a.kv_hi = fields.data + kHi * max_rows, a.seqs = fields.data + kSeq * max_rows;
  a.block_tables = tables.data;
  a.table_len = int(tables.dims[1]), a.block_len = kAttentionBlockLen;
  num_positions = int64_t(1) << 40, num_blocks = cache.dims[1], num_seqs = tables.dims[0];
  if (a.rotary_dim > 0) {
    if (cosine.dims.size() != 2 || cosine.dims[1] * 2 != a.rotary_dim || !same(sine.dims, cosine.dims))
      return invalid("attention: bad rope tables");
    a.rope_cos = cosine.data, a.rope_sin = sine.data;
    num_positions = cosine.dims[0];
  }
  if (a.window_len < 0 || !(a.soft_cap >= 0.0f)) return invalid("attention: bad attributes");
  if (has_sinks && !(a.sinks = row_floats(sinks, sinks_row, a.num_heads))) return invalid("attention: bad shape of sinks");
  if (!norms_are_sound || !norms_heads(a.q_norm, a.num_heads, a.head_dim) ||
      !norms_heads(a.k_norm, a.num_kv_heads, a.head_dim))
    return invalid("attention: bad norms of queries and keys");
  a.y = y.data;
  return ffi::Error::Success();
}

const char* Attention::admit(Admitted& before) {
  if (!rows.read(&args.num_rows)) return "attention: bad row count";
  // Like layers share the array of their cache, and so its number of blocks.
  for (const Attention* other : before.attentions)
    if (same_rows(other->args, args) && other->num_blocks == num_blocks && other->num_positions == num_positions &&
        other->num_seqs == num_seqs)
      return nullptr;
  before.attentions.push_back(this);
  return rows_are_sound(args, num_blocks, num_positions, num_seqs) ? nullptr : "attention: a row points outside the cache";
}

}  // namespace strop

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_allocate, strop::allocate,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());
