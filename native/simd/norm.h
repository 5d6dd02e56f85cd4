// The norm of one row.
#pragma once

#include <cmath>

#include "kernels/norm.h"
#include "simd/vec.h"

namespace strop::STROP_ISA {

inline float mean(const float* x, int len) {
  Floats total = zero_floats();
  int k = 0;
  for (; k + 16 <= len; k += 16) total = add(total, load(x + k));
  float sum = sum_lanes(total);
  for (; k < len; ++k) sum += x[k];
  return sum / float(len);
}

// 1 / sqrt(mean((x - centre)^2) + eps)
inline float inverse_deviation(const float* x, int len, float centre, float eps) {
  const Floats c = broadcast(centre);
  Floats squares = zero_floats();
  int k = 0;
  for (; k + 16 <= len; k += 16) {
    const Floats v = sub(load(x + k), c);
    squares = fma(v, v, squares);
  }
  float sum = sum_lanes(squares);
  for (; k < len; ++k) sum += (x[k] - centre) * (x[k] - centre);
  return 1.0f / std::sqrt(sum / float(len) + eps);
}

inline void normalise(const NormArgs& norm, const float* x, float* out) {
  const float centre = norm.kind == NormKind::kLayer ? mean(x, norm.len) : 0.0f;
  const float scale = inverse_deviation(x, norm.len, centre, norm.eps);
  int k = 0;
  for (; k + 16 <= norm.len; k += 16) {
    const Floats v = mul(mul(sub(load(x + k), broadcast(centre)), broadcast(scale)), load(norm.weight + k));
    store(out + k, norm.bias ? add(v, load(norm.bias + k)) : v);
  }
  for (; k < norm.len; ++k) out[k] = (x[k] - centre) * scale * norm.weight[k] + (norm.bias ? norm.bias[k] : 0.0f);
}

}  // namespace strop::STROP_ISA
