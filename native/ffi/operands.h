// What an operation's handler sees of its call: operands in order, then attributes in order, each checked as it is taken.
// A kernel sees only pointers whose sizes were compared here.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace strop {

namespace ffi = xla::ffi;

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("strop: " + what); }

using Dims = ffi::Span<const int64_t>;

struct Tensor {
  void* data = nullptr;
  ffi::DataType dtype = ffi::DataType::INVALID;
  Dims dims;
};

template <ffi::DataType kType>
struct View {
  ffi::NativeType<kType>* data = nullptr;
  Dims dims;

  int64_t count() const {
    int64_t total = 1;
    for (const int64_t dim : dims) total *= dim;
    return total;
  }
};

// Takes a call apart. After the first operand or attribute that is missing or of another type, `ok` stays false.
class Operands {
 public:
  // The first `num_operands` tensors are the program's operands.
  Operands(const std::vector<Tensor>& tensors, size_t num_operands, ffi::Span<const int32_t> code, size_t at)
      : tensors_(tensors), num_operands_(num_operands), code_(code), at_(at) {
    slots_ = at_ + 1;
    slots_left_ = item(at_);
    at_ = slots_ + slots_left_;
    attrs_left_ = item(at_++);
    ok = ok && attrs_left_ <= int64_t(code_.size()) - int64_t(at_);
  }

  // The next operand. Integers are followed, and checked before the program runs: it must not make them itself.
  template <ffi::DataType kType>
  View<kType> next() {
    return take<kType>(kType == ffi::S32 || kType == ffi::U32 ? num_operands_ : tensors_.size());
  }
  // The next operand where an attribute tells its type.
  Tensor next_of(ffi::DataType type) { return take_of(type, tensors_.size()); }
  // The next result.
  template <ffi::DataType kType>
  View<kType> result() {
    return take<kType>(tensors_.size());
  }
  int32_t attr() {
    if (!ok || attrs_left_ == 0) return fail<int32_t>();
    --attrs_left_;
    return code_[at_++];
  }
  float float_attr() {
    const int32_t bits = attr();
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  bool all_taken() const { return ok && slots_left_ == 0 && attrs_left_ == 0; }
  size_t end() const { return at_ + attrs_left_; }  // where the next call begins

  bool ok = true;

 private:
  template <ffi::DataType kType>
  View<kType> take(size_t end_slot) {
    const Tensor tensor = take_of(kType, end_slot);
    return {static_cast<ffi::NativeType<kType>*>(tensor.data), tensor.dims};
  }
  Tensor take_of(ffi::DataType type, size_t end_slot) {
    if (!ok || slots_left_ == 0) return fail<Tensor>();
    --slots_left_;
    const size_t slot = item(slots_++);
    if (slot >= end_slot || tensors_[slot].dtype != type) return fail<Tensor>();
    return tensors_[slot];
  }
  uint32_t item(size_t at) {
    if (at >= code_.size() || code_[at] < 0) return fail<uint32_t>();
    return uint32_t(code_[at]);
  }
  template <class T>
  T fail() {
    ok = false;
    return {};
  }

  const std::vector<Tensor>& tensors_;
  size_t num_operands_;
  ffi::Span<const int32_t> code_;
  size_t at_, slots_;
  uint32_t slots_left_;
  uint32_t attrs_left_;
};

inline bool same(Dims a, Dims b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

// Rows in use: known only when the step runs, bounded by the padded shape.
struct RowCount {
  const int32_t* count = nullptr;
  int64_t limit = 0;

  // False: there is no such count.
  bool bind(const View<ffi::S32>& counts, int index, int64_t max_rows) {
    if (index < 0 || counts.count() <= index) return false;
    count = counts.data + index, limit = max_rows;
    return true;
  }
  bool read(int* value) const { return (*value = *count) >= 0 && *value <= limit; }
};

inline bool is_format(int value) { return value >= 0 && value <= int(WeightFormat::kF32); }
inline bool is_activation(int value) { return value >= 0 && value <= int(Activation::kGeluSigmoid); }

// A matrix of a stack of weights [L, bytes]; false when the bytes do not hold the layout's tiles.
inline bool matrix_bytes(const View<ffi::U8>& weights, int index, const WeightLayout& layout, const uint8_t** data) {
  if (weights.dims.size() != 2 || index < 0 || index >= weights.dims[0]) return false;
  const size_t stride = weights.dims[1];
  if (layout.k_len <= 0 || layout.num_tiles <= 0 || layout.tile_bytes() * layout.num_tiles > stride) return false;
  if (layout.quantised() && layout.k_len % layout.group_len() != 0) return false;
  *data = weights.data + stride * index;
  return reinterpret_cast<uintptr_t>(*data) % 64 == 0;
}

// A row of a stack [L, len] of float parameters, or null when there is none such.
inline const float* row_floats(const View<ffi::F32>& stack, int index, int64_t len) {
  if (stack.dims.size() != 2 || index < 0 || index >= stack.dims[0] || stack.dims[1] != len) return nullptr;
  return stack.data + size_t(index) * len;
}

// [weight], [bias] of a norm; attributes has weight, has bias, row of their stacks [L, len] or [L, pieces, len], kind,
// eps. Without a weight there is no norm. False: there is none such.
inline bool take_norm(Operands& operands, NormArgs* norm) {
  const bool has_weight = operands.attr(), has_bias = operands.attr();
  const int row = operands.attr(), kind = operands.attr();
  norm->eps = operands.float_attr();
  if (kind < 0 || kind > int(NormKind::kLayer)) return false;
  norm->kind = NormKind(kind);
  const auto weight = has_weight ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto bias = has_bias ? operands.next<ffi::F32>() : View<ffi::F32>{};
  if (!operands.ok || !has_weight) return operands.ok && !has_bias;
  const auto& dims = weight.dims;
  if (dims.size() < 2 || dims.size() > 3 || row < 0 || row >= dims[0] || (has_bias && !same(bias.dims, dims))) return false;
  norm->len = int(dims.back()), norm->num_pieces = dims.size() == 3 ? int(dims[1]) : 1;
  const size_t begin = size_t(row) * norm->num_pieces * norm->len;
  norm->weight = weight.data + begin;
  norm->bias = has_bias ? bias.data + begin : nullptr;
  return norm->len > 0 && norm->num_pieces > 0;
}

}  // namespace strop
