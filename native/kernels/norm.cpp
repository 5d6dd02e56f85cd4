// y = residual + scale * norm(x). A row's result depends on nothing but the row.
#include "kernels/norm.h"

#include <algorithm>
#include <cstddef>

#include "simd/norm.h"
#include "simd/vec.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {
namespace {

void add_norm_row(const AddNormArgs& args, size_t row) {
  const float* x = args.x + row * args.len;
  const float* residual = args.residual ? args.residual + row * args.len : nullptr;
  float* y = args.y + row * args.len;
  if (args.norm.weight != nullptr) {
    normalise(args.norm, x, y);
    x = y;
  }
  int k = 0;
  for (; k + 16 <= args.len; k += 16) {
    const Floats scaled = mul(load(x + k), broadcast(args.scale));
    store(y + k, residual ? add(load(residual + k), scaled) : scaled);
  }
  for (; k < args.len; ++k) y[k] = residual ? residual[k] + args.scale * x[k] : args.scale * x[k];
}

}  // namespace

void add_norm(const AddNormArgs& args) {
  constexpr int kRowsPerChunk = 8;
  Pool::instance().run((args.num_rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int chunk) {
    const int end = std::min(args.num_rows, (chunk + 1) * kRowsPerChunk);
    for (int row = chunk * kRowsPerChunk; row < end; ++row) add_norm_row(args, row);
  });
}

}  // namespace strop::STROP_ISA
