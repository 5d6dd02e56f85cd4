// y = residual + cap(scale act(norm(x) W^T + bias)): the arguments, free of any framework's types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/norm.h"

namespace strop {

// Always inlined: no ISA may borrow another's code.
#define STROP_INLINE __attribute__((always_inline)) inline

// Packed weights are tiles of 16 output columns. A quantised tile holds, for G = K / 32 groups:
//   codes   [G] of [4][16][4] bytes holding two 4-bit codes (low nibbles are k 0..15 of the group, high ones 16..31);
//           of the same and then [8][16][4] bits, the fifth ones; or of [8][16][4] 8-bit codes;
//   scale   [G][16] half; then, when the format has one, offset [G][16] half: added to the weights of a group, or
//           (k..Zeros) to their codes: minus the code that stands for 0;
//           or in two levels, for S = K / 256: [G][16] of 8 bits, the offset's [G][16] likewise, then [S][16] half and the
//           offset's [S][16]. A scale is the product of both. With offsets the 8 bits have no sign, without they have.
// A float tile holds [K/2][16][2] bf16, or [K][16] half or float. Tiles start at multiples of 64 bytes.
enum class WeightFormat : int32_t {
  kQ4, kQ4Offset, kQ4TwoLevel, kQ4Zeros, kQ5, kQ5Offset, kQ5TwoLevel, kQ8, kQ8Offset, kQ8TwoLevel, kQ8Zeros,
  kBf16, kF16, kF32
};

// What a quantised format is made of.
struct Coding {
  int code_bits;
  bool has_offset;
  bool two_level;
  bool has_zeros;  // the offset is of the codes
};

STROP_INLINE constexpr Coding coding_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4: return {4, false, false, false};
    case WeightFormat::kQ4Offset: return {4, true, false, false};
    case WeightFormat::kQ4TwoLevel: return {4, true, true, false};
    case WeightFormat::kQ4Zeros: return {4, true, false, true};
    case WeightFormat::kQ5: return {5, false, false, false};
    case WeightFormat::kQ5Offset: return {5, true, false, false};
    case WeightFormat::kQ5TwoLevel: return {5, true, true, false};
    case WeightFormat::kQ8: return {8, false, false, false};
    case WeightFormat::kQ8Offset: return {8, true, false, false};
    case WeightFormat::kQ8TwoLevel: return {8, false, true, false};
    case WeightFormat::kQ8Zeros: return {8, true, false, true};
    default: return {};
  }
}

enum class Activation : int32_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kGeluSigmoid = 5 };

constexpr int kTileColumns = 16;
constexpr int kGroupLen = 32;
constexpr int kSuperLen = 256;  // weights that share one half of a scale in two levels

struct WeightLayout {
  WeightFormat format;
  int zero;  // subtracted from every code
  int k_len;
  int num_tiles;

  STROP_INLINE bool quantised() const { return format <= WeightFormat::kQ8Zeros; }
  STROP_INLINE int num_groups() const { return k_len / kGroupLen; }
  STROP_INLINE int group_len() const { return coding_of(format).two_level ? kSuperLen : kGroupLen; }  // divides K
  STROP_INLINE size_t codes_bytes() const { return size_t(coding_of(format).code_bits) * 64 * num_groups(); }
  STROP_INLINE size_t tile_bytes() const {
    size_t bytes;
    if (quantised()) {
      const Coding coding = coding_of(format);
      const size_t scales = coding.two_level ? num_groups() * 16 + k_len / kSuperLen * 32 : num_groups() * 32;
      bytes = codes_bytes() + scales * (coding.has_offset ? 2 : 1);
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
  int64_t y_stride;           // floats from one row of y, or of the residual, to the next
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
