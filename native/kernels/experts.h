// A mixture of experts: y = residual + scale * sum over a row's chosen experts of share * expert(x).
#pragma once

#include "kernels/linear.h"

namespace strop {

// One product of every expert: the first expert's call without rows, and how far on the next one's parameters lie.
struct ExpertProducts {
  LinearArgs first;
  size_t weights_stride;  // bytes
  size_t bias_stride;     // floats
};

struct ExpertsArgs {
  ExpertProducts gate_up;  // x [num_rows, D], the gated activation
  ExpertProducts down;
  const float* scores;     // [num_rows, num_experts] of the router; the shares are their softmax
  const float* residual;   // [num_rows, D], or null
  float scale;
  bool normalise;          // the shares of the chosen are scaled to sum to 1
  int num_experts;
  int num_active;          // chosen by each row: those of the largest scores, of equal ones the first
  float* y;                // [num_rows, D]
  int num_rows;
  const uint8_t* next_weights = nullptr;  // what will be read after this, or null: fetched ahead
  size_t next_bytes = 0;
};

}  // namespace strop
