// y = residual + scale * norm(x), and the norm as other operations take it: the arguments.
#pragma once

#include <cstdint>

namespace strop {

enum class NormKind : int32_t { kRms = 0, kLayer = 1 };

// rms: x / sqrt(mean(x^2) + eps) * weight + bias. layer: the same of x - mean(x).
struct NormArgs {
  const float* weight;  // [num_pieces, len], or null: no norm
  const float* bias;    // [num_pieces, len], or null
  NormKind kind;
  float eps;
  int len;
  int num_pieces;  // of a vector, that each have weights of their own; only attention takes more than 1
};

struct AddNormArgs {
  const float* x;         // [num_rows, len]
  NormArgs norm;
  const float* residual;  // [num_rows, len], or null
  float scale;
  float* y;               // [num_rows, len]
  int num_rows;
  int len;
};

}  // namespace strop
