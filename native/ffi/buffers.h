// Checks shared by the FFI handlers: a kernel sees only pointers whose sizes were compared here.
#pragma once

#include <algorithm>
#include <string>

#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace strop {

namespace ffi = xla::ffi;

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("strop: " + what); }

template <class Shape>
inline bool same(const Shape& a, const Shape& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Rows in use: a device scalar, bounded by the padded shape.
inline bool bounded(const ffi::Buffer<ffi::S32>& counts, int index, int64_t limit, int* value) {
  if (int64_t(counts.element_count()) <= index) return false;
  *value = counts.typed_data()[index];
  return *value >= 0 && *value <= limit;
}

// The layer's slice of a stacked weight [L, bytes]; false when the bytes do not hold the layout's tiles.
inline bool layer_bytes(const ffi::Buffer<ffi::U8>& weights, int layer, const WeightLayout& layout,
                        const uint8_t** data) {
  if (weights.dimensions().size() != 2 || layer < 0 || layer >= weights.dimensions()[0]) return false;
  const size_t stride = weights.dimensions()[1];
  if (layout.k_len <= 0 || layout.num_tiles <= 0 || layout.tile_bytes() * layout.num_tiles > stride) return false;
  if (layout.quantised() && layout.k_len % kGroupLen != 0) return false;
  *data = weights.typed_data() + stride * layer;
  return reinterpret_cast<uintptr_t>(*data) % 64 == 0;
}

// A stacked [L, N] float parameter, or null when the caller passed the [1, 1] stand-in.
inline const float* layer_floats(const ffi::Buffer<ffi::F32>& stack, int layer, int64_t len) {
  const auto shape = stack.dimensions();
  if (shape.size() != 2 || layer >= shape[0] || shape[1] != len) return nullptr;
  return stack.typed_data() + size_t(layer) * len;
}

}  // namespace strop
