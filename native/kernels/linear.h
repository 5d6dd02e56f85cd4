// y = residual + cap(scale act(norm(x) W^T + bias)): the arguments, free of any framework's types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/norm.h"

namespace strop {

// Packed weights are tiles of 16 output columns. A quantised tile holds, for G = K / 32 groups:
//   codes   [G][4][16][4] bytes holding two 4-bit codes (low nibbles are k 0..15 of the group, high ones 16..31),
//           or [G][8][16][4] 8-bit codes;
//   scale   [G][16] half; then, when the format has one, offset [G][16] half: added to the weights of a group, or
//           (k..Zeros) to their codes: minus the code that stands for 0.
// A float tile holds [K/2][16][2] bf16, or [K][16] half or float. Tiles start at multiples of 64 bytes.
enum class WeightFormat : int32_t {
  kQ4 = 0, kQ4Offset = 1, kQ8 = 2, kQ8Offset = 3, kBf16 = 4, kF16 = 5, kF32 = 6, kQ4Zeros = 7, kQ8Zeros = 8
};

enum class Activation : int32_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kGeluSigmoid = 5 };

constexpr int kTileColumns = 16;
constexpr int kGroupLen = 32;

// Always inlined: no ISA may borrow another's code.
#define STROP_INLINE __attribute__((always_inline)) inline

struct WeightLayout {
  WeightFormat format;
  int zero;  // subtracted from every code (8-bit formats 128 or 16, 4-bit 8 or 0)
  int k_len;
  int num_tiles;

  STROP_INLINE bool four_bit() const {
    return format == WeightFormat::kQ4 || format == WeightFormat::kQ4Offset || format == WeightFormat::kQ4Zeros;
  }
  STROP_INLINE bool quantised() const { return format <= WeightFormat::kQ8Offset || has_zeros(); }
  STROP_INLINE bool has_zeros() const { return format >= WeightFormat::kQ4Zeros; }
  STROP_INLINE bool has_offset() const {
    return format == WeightFormat::kQ4Offset || format == WeightFormat::kQ8Offset || has_zeros();
  }
  STROP_INLINE int num_groups() const { return k_len / kGroupLen; }
  STROP_INLINE size_t codes_bytes() const {
    const size_t group = four_bit() ? 256 : 512;
    return group * num_groups();
  }
  STROP_INLINE size_t tile_bytes() const {
    size_t bytes;
    if (quantised()) {
      bytes = codes_bytes() + size_t(num_groups()) * 32 * (has_offset() ? 2 : 1);
    } else {
      const size_t item = format == WeightFormat::kF32 ? 4 : 2;
      bytes = size_t(k_len + (format == WeightFormat::kBf16 ? k_len % 2 : 0)) * kTileColumns * item;
    }
    return (bytes + 63) / 64 * 64;
  }
};

struct LinearArgs {
  const float* x;             // [num_rows, K], or as many rows as `row_ids` picks from
  const int32_t* row_ids;     // [num_rows] rows of x to read, or null: all in order
  NormArgs norm;              // before the product
  const uint8_t* weights;     // num_tiles tiles
  WeightLayout layout;
  const float* bias;          // [N] in the tiles' column order, or null
  const float* residual;      // like y, or null; may be y itself
  Activation activation;
  bool gated;                 // tiles alternate gate and up: act(gate) * up
  float scale;
  float soft_cap;             // 0: none, else y becomes soft_cap * tanh(y / soft_cap)
  float* y;                   // [num_rows, num_columns], or as many rows as `y_row_ids` picks from
  int num_rows;
  int num_columns;            // of y
  const int32_t* y_row_ids = nullptr;  // [num_rows] rows of y to write, or null: all in order
  const float* row_scale = nullptr;    // [num_rows] instead of `scale`, or null
  float gate_limit = 0.0f;    // 0: none, else act(min(gate, limit)) * (up within +-limit, plus 1)
  const uint8_t* next_weights = nullptr;  // what will be read after this, or null: fetched ahead
  size_t next_bytes = 0;
};

// Row lookup in a packed [V, D] weight: y[i] = residual[i] + (scale * W[tokens[i]] + bias). Tokens are checked by the caller.
struct EmbedArgs {
  const int32_t* tokens;
  const uint8_t* weights;
  WeightLayout layout;
  float scale;
  const float* bias;      // [K], or null
  const float* residual;  // [num_rows, K], or null
  float* y;               // [num_rows, K]
  int num_rows;
};

}  // namespace strop
