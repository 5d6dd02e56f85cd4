// What this machine can do at most: products per second of each kind the kernels use, and bytes read per second.
#pragma once

#include <cstdint>

namespace strop {

// The product instruction of quantised, bf16 and float32 linears.
enum class ProductKind : int32_t { kInt8 = 0, kBf16 = 1, kF32 = 2 };

struct ProbeKernels {
  // Repeats independent chains of one product instruction on registers; returns the multiplications and additions done.
  int64_t (*products)(ProductKind kind, int64_t num_rounds);
  // Reads every byte once, the way a linear sweeps its tiles; returns something that depends on all of them.
  uint64_t (*read)(const uint8_t* data, int64_t num_bytes);
};

}  // namespace strop
