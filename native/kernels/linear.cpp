// Linear layers. Numbers are defined so that neither the number of rows, nor the tiling, nor the threads change a bit:
//   quantised: x is rounded to int8 per group of 32; every group's integer product is exact; then, in the order of the
//   groups, acc = fma(offset, scale_x * sum_x, acc) and acc = fma(product, scale_w * scale_x, acc) in float32.
//   float: acc = fma(x, w, acc) in the order of k (bf16 weights: pairs of k, x rounded to bf16).
#include "kernels/linear.h"

#include <algorithm>

#include "kernels/scratch.h"
#if defined(STROP_AMX)
#include "simd/amx.h"
#endif
#include "simd/norm.h"
#include "simd/vec.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {
namespace {

// Activations ready for the product. Quantised: codes, scale, sum; float: values (bf16 pairs or floats).
struct Activations {
  int8_t* codes;      // [M, K], each row `codes_stride` after the one before
  float* scale;       // [M, G]
  float* sum;         // [M, G] scale * sum of codes
  int32_t* zero_sum;  // [M, G] -zero * sum of codes
  float* values;      // [M, K]
  uint16_t* pairs;    // [M, K rounded up to even]
  int pairs_stride;
  int codes_stride;
};

void quantise_group(const float* x, int8_t* codes, float* scale, float* sum, int32_t* zero_sum, int zero) {
  Floats a = load(x), b = load(x + 16);
  const float largest = max_lanes(max(abs(a), abs(b)));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  Ints qa = to_ints(mul(a, broadcast(inverse))), qb = to_ints(mul(b, broadcast(inverse)));
  store_int8(codes, qa);
  store_int8(codes + 16, qb);
  const int32_t total = sum_lanes(add(qa, qb));
  *scale = largest / 127.0f;
  *sum = *scale * float(total);
  *zero_sum = -zero * total;
}

void prepare_row(const LinearArgs& args, const Activations& acts, int row, float* normed) {
  const int k_len = args.layout.k_len;
  const float* x = args.x + size_t(args.row_ids ? args.row_ids[row] : row) * k_len;
  if (args.norm.weight != nullptr) {
    normalise(args.norm, x, normed);
    x = normed;
  }
  if (args.layout.quantised()) {
    const int num_groups = args.layout.num_groups();
    for (int g = 0; g < num_groups; ++g) {
      const size_t at = size_t(row) * num_groups + g;
      quantise_group(x + g * kGroupLen, acts.codes + size_t(row) * acts.codes_stride + g * kGroupLen, acts.scale + at,
                     acts.sum + at, acts.zero_sum + at, args.layout.zero);
    }
  } else if (args.layout.format == WeightFormat::kBf16) {
    uint16_t* out = acts.pairs + size_t(row) * acts.pairs_stride;
    for (int k = 0; k < k_len; ++k) out[k] = float_to_bf16(x[k]);
    if (k_len % 2) out[k_len] = 0;
  } else {
    std::memcpy(acts.values + size_t(row) * k_len, x, sizeof(float) * k_len);
  }
}

// A tile is too short for the hardware to see a stream, and a matrix often is: on its first use, ask for what this
// thread will read so many bytes later, be it of the next matrix.
constexpr size_t kAheadBytes = 64 << 10;

// What one thread reads, in order: the tiles up to `end`, then `next`.
struct Stream {
  const uint8_t* end;
  const uint8_t* next;
  const uint8_t* next_end;

  // Where to fetch ahead while reading at p; null: nowhere.
  const uint8_t* ahead_of(const uint8_t* p) const {
    if (p + kAheadBytes < end) return p + kAheadBytes;  // still in this matrix
    if (next == nullptr) return nullptr;
    const uint8_t* beyond = next + (p + kAheadBytes - end);
    return beyond < next_end ? beyond : nullptr;
  }
};

// The codes of one group, a slice of four k's at a time: slice and slice + 4.
template <int kBits>
STROP_INLINE void load_slices(const uint8_t* group, int slice, Bytes& low, Bytes& high) {
  low = load_bytes(group + slice * 64);
  if constexpr (kBits == 8) {
    high = load_bytes(group + (slice + 4) * 64);
  } else {
    high = high_nibbles(low), low = low_nibbles(low);
  }
  if constexpr (kBits == 5) {
    low = with_fifth_bits(low, group + 256 + slice * 8);
    high = with_fifth_bits(high, group + 256 + (slice + 4) * 8);
  }
}

// The scales of a tile, and its offsets.
template <WeightFormat kFormat>
struct Scales {
  static constexpr Coding kCoding = coding_of(kFormat);
  const uint8_t* begin;
  size_t num_groups;

  STROP_INLINE Floats scale(size_t g) const { return at(g, 0); }
  STROP_INLINE Floats offset(size_t g) const {
    if constexpr (kCoding.has_zeros) return mul(at(g, 1), scale(g));
    return at(g, 1);
  }

 private:
  STROP_INLINE Floats at(size_t g, size_t part) const {
    if constexpr (!kCoding.two_level)
      return load_half(reinterpret_cast<const uint16_t*>(begin + (part * num_groups + g) * 32));
    constexpr size_t kGroups = kSuperLen / kGroupLen, kParts = kCoding.has_offset ? 2 : 1;
    const uint8_t* super = begin + kParts * num_groups * 16 + (part * num_groups + g) / kGroups * 32;
    // Exact: 11 bits times 8.
    return mul(load_half(reinterpret_cast<const uint16_t*>(super)),
               load_int8<!kCoding.has_offset>(begin + (part * num_groups + g) * 16));
  }
};

// kRows x (kTiles * 16) outputs of a quantised product, written to out [kRows][kTiles * 16].
template <WeightFormat kFormat, int kRows, int kTiles>
void quantised_tile(const WeightLayout& layout, const uint8_t* tile, const Activations& acts, int row0,
                    const uint8_t* ahead, float* out) {
  const int num_groups = layout.num_groups(), codes_stride = acts.codes_stride;
  const size_t tile_bytes = layout.tile_bytes(), codes_bytes = layout.codes_bytes();
  constexpr int kBits = coding_of(kFormat).code_bits, kGroupBytes = kBits * 64;
  constexpr bool kOffset = coding_of(kFormat).has_offset;
  // With few chains the latency of the integer product would show: keep even and odd slices apart (sums are exact).
  constexpr int kSplit = kRows * kTiles < 6 ? 2 : 1;
  Floats acc[kTiles][kRows];
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < kRows; ++r) acc[t][r] = zero_floats();
  const int8_t* codes = acts.codes + size_t(row0) * acts.codes_stride;
  const float* scale = acts.scale + size_t(row0) * num_groups;
  const float* sum = acts.sum + size_t(row0) * num_groups;
  const int32_t* zero_sum = acts.zero_sum + size_t(row0) * num_groups;
  const size_t ahead_step = ahead ? kTiles * tile_bytes / num_groups : 0;
  for (int g = 0; g < num_groups; ++g, codes += kGroupLen) {
    for (size_t line = 0; line < ahead_step; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
    ahead += ahead_step;
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* w = tile + t * tile_bytes + size_t(g) * kGroupBytes;
      Ints dot[kSplit][kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        dot[0][r] = kOffset ? zero_ints() : broadcast_int(zero_sum[size_t(r) * num_groups + g]);
        if (kSplit == 2) dot[kSplit - 1][r] = zero_ints();
      }
#pragma GCC unroll 4
      for (int slice = 0; slice < 4; ++slice) {
        Bytes low, high;
        load_slices<kBits>(w, slice, low, high);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const int8_t* a = codes + size_t(r) * codes_stride + slice * 4;
          dot[0][r] = dot_u8s8<kBits>(dot[0][r], low, a);
          dot[kSplit - 1][r] = dot_u8s8<kBits>(dot[kSplit - 1][r], high, a + 16);
        }
      }
      const Scales<kFormat> scales{tile + t * tile_bytes + codes_bytes, size_t(num_groups)};
      const Floats w_scale = scales.scale(g);
      Floats w_offset;
      if constexpr (kOffset) w_offset = scales.offset(g);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const size_t at = size_t(r) * num_groups + g;
        if constexpr (kOffset) acc[t][r] = fma(w_offset, broadcast(sum[at]), acc[t][r]);
        const Ints total = kSplit == 2 ? add(dot[0][r], dot[kSplit - 1][r]) : dot[0][r];
        acc[t][r] = fma(to_floats(total), mul(w_scale, broadcast(scale[at])), acc[t][r]);
      }
    }
  }
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < kRows; ++r) store(out + (r * kTiles + t) * 16, acc[t][r]);
}

template <WeightFormat kFormat, int kRows, int kTiles>
void float_tile(const WeightLayout& layout, const uint8_t* tile, const Activations& acts, int row0, const uint8_t*, float* out) {
  const int k_len = layout.k_len;
  const size_t tile_bytes = layout.tile_bytes();
  Floats acc[kTiles][kRows];
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < kRows; ++r) acc[t][r] = zero_floats();
  if constexpr (kFormat == WeightFormat::kBf16) {
    const uint16_t* x = acts.pairs + size_t(row0) * acts.pairs_stride;
    for (int k = 0; k < k_len; k += 2)
      for (int t = 0; t < kTiles; ++t) {
        const Pairs w = load_pairs(reinterpret_cast<const uint16_t*>(tile + t * tile_bytes) + size_t(k) * 16);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          acc[t][r] = dot_bf16(acc[t][r], w, broadcast_pair(x + size_t(r) * acts.pairs_stride + k));
      }
  } else {
    const float* x = acts.values + size_t(row0) * k_len;
    for (int k = 0; k < k_len; ++k)
      for (int t = 0; t < kTiles; ++t) {
        Floats w;
        if constexpr (kFormat == WeightFormat::kF16)
          w = load_half(reinterpret_cast<const uint16_t*>(tile + t * tile_bytes) + size_t(k) * 16);
        else
          w = load(reinterpret_cast<const float*>(tile + t * tile_bytes) + size_t(k) * 16);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[t][r] = fma(w, broadcast(x[size_t(r) * k_len + k]), acc[t][r]);
      }
  }
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < kRows; ++r) store(out + (r * kTiles + t) * 16, acc[t][r]);
}

#if defined(STROP_AMX)
constexpr int kMinTileRows = 6;  // below that the vector kernel wins
constexpr int kMaxTileRows = 16;

// The 8-bit codes of one packed tile: itself, or narrower ones expanded into `expanded`.
template <int kBits>
const uint8_t* expand_codes(const WeightLayout& layout, const uint8_t* tile, uint8_t* expanded) {
  if constexpr (kBits == 8) return tile;
  for (int g = 0; g < layout.num_groups(); ++g)
    for (int slice = 0; slice < 4; ++slice) {
      Bytes low, high;
      load_slices<kBits>(tile + size_t(g) * kBits * 64, slice, low, high);
      store_bytes(expanded + size_t(g) * 512 + slice * 64, low);
      store_bytes(expanded + size_t(g) * 512 + (slice + 4) * 64, high);
    }
  return expanded;
}

// As quantised_tile, for one tile and up to 16 rows: the integer products come from AMX, the rest is the same.
template <WeightFormat kFormat>
void amx_tile(const WeightLayout& layout, const uint8_t* tile, const uint8_t* codes8, const Activations& acts, int row0,
              int rows, float* out) {
  const int num_groups = layout.num_groups(), codes_stride = acts.codes_stride;
  const int8_t* codes = acts.codes + size_t(row0) * acts.codes_stride;
  constexpr bool kOffset = coding_of(kFormat).has_offset;
  const Scales<kFormat> scales{tile + layout.codes_bytes(), size_t(num_groups)};
  alignas(64) int32_t sums[2][kMaxTileRows * 16];
  Floats acc[kMaxTileRows];
  for (Floats& a : acc) a = zero_floats();
  tile_product<0>(codes, codes_stride, codes8, sums[0]);
  for (int g = 0; g < num_groups; ++g) {
    if (g + 1 < num_groups) {
      const int8_t* left = codes + (g + 1) * kGroupLen;
      const uint8_t* right = codes8 + size_t(g + 1) * 512;
      if (g % 2) tile_product<0>(left, codes_stride, right, sums[0]);
      else tile_product<1>(left, codes_stride, right, sums[1]);
    }
    const Floats w_scale = scales.scale(g);
    Floats w_offset;
    if constexpr (kOffset) w_offset = scales.offset(g);
#pragma GCC unroll 16
    for (int r = 0; r < kMaxTileRows; ++r) {
      if (r >= rows) break;
      const size_t at = size_t(row0 + r) * num_groups + g;
      Ints total = load_ints(sums[g % 2] + r * 16);
      if constexpr (kOffset) acc[r] = fma(w_offset, broadcast(acts.sum[at]), acc[r]);
      else total = add(total, broadcast_int(acts.zero_sum[at]));
      acc[r] = fma(to_floats(total), mul(w_scale, broadcast(acts.scale[at])), acc[r]);
    }
  }
  for (int r = 0; r < rows; ++r) store(out + r * 16, acc[r]);
}
#endif

using TileFn = void (*)(const WeightLayout&, const uint8_t*, const Activations&, int, const uint8_t*, float*);

template <int kRows, int kTiles>
TileFn tile_function(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4: return quantised_tile<WeightFormat::kQ4, kRows, kTiles>;
    case WeightFormat::kQ4Offset: return quantised_tile<WeightFormat::kQ4Offset, kRows, kTiles>;
    case WeightFormat::kQ4TwoLevel: return quantised_tile<WeightFormat::kQ4TwoLevel, kRows, kTiles>;
    case WeightFormat::kQ4Zeros: return quantised_tile<WeightFormat::kQ4Zeros, kRows, kTiles>;
    case WeightFormat::kQ5: return quantised_tile<WeightFormat::kQ5, kRows, kTiles>;
    case WeightFormat::kQ5Offset: return quantised_tile<WeightFormat::kQ5Offset, kRows, kTiles>;
    case WeightFormat::kQ5TwoLevel: return quantised_tile<WeightFormat::kQ5TwoLevel, kRows, kTiles>;
    case WeightFormat::kQ8: return quantised_tile<WeightFormat::kQ8, kRows, kTiles>;
    case WeightFormat::kQ8Offset: return quantised_tile<WeightFormat::kQ8Offset, kRows, kTiles>;
    case WeightFormat::kQ8TwoLevel: return quantised_tile<WeightFormat::kQ8TwoLevel, kRows, kTiles>;
    case WeightFormat::kQ8Zeros: return quantised_tile<WeightFormat::kQ8Zeros, kRows, kTiles>;
    case WeightFormat::kBf16: return float_tile<WeightFormat::kBf16, kRows, kTiles>;
    case WeightFormat::kF16: return float_tile<WeightFormat::kF16, kRows, kTiles>;
    case WeightFormat::kF32: return float_tile<WeightFormat::kF32, kRows, kTiles>;
  }
  return nullptr;
}

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 12 integer and 12 float accumulators of 32 registers
#else
constexpr int kMaxRows = 2;
#endif
constexpr int kMaxTiles = 4;

// The block shape for `rows` rows and up to `tiles` adjacent tiles: few rows take more tiles to hide latency.
int tiles_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

TileFn pick(WeightFormat format, int rows, int tiles) {
#define STROP_CASE(R, T) \
  if (rows == R && tiles == T) return tile_function<R, T>(format);
  STROP_CASE(1, 1) STROP_CASE(1, 2) STROP_CASE(1, 4) STROP_CASE(2, 1) STROP_CASE(2, 2)
#if defined(__AVX512F__)
  STROP_CASE(3, 1) STROP_CASE(3, 2) STROP_CASE(4, 1) STROP_CASE(5, 1) STROP_CASE(6, 1) STROP_CASE(7, 1)
  STROP_CASE(8, 1) STROP_CASE(9, 1) STROP_CASE(10, 1) STROP_CASE(11, 1) STROP_CASE(12, 1)
#endif
#undef STROP_CASE
  return nullptr;
}

// The error function to 1.5e-7 (Abramowitz & Stegun 7.1.26).
Floats erf(Floats x) {
  const Floats a = abs(x), one = broadcast(1.0f);
  const Floats t = div(one, fma(a, broadcast(0.3275911f), one));
  Floats p = broadcast(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fma(p, t, broadcast(c));
  const Floats tail = mul(mul(p, t), exp2_nonpositive(mul(mul(a, a), broadcast(-1.44269504f))));
  const Floats positive = sub(one, tail);
  return select_nonnegative(x, positive, sub(zero_floats(), positive));
}

Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kSilu: return mul(x, sigmoid(x));
    case Activation::kRelu: return max(x, zero_floats());
    case Activation::kGeluSigmoid: return mul(x, sigmoid(mul(x, broadcast(1.702f))));
    case Activation::kGelu: {
      const Floats half = mul(x, broadcast(0.5f));
      return fma(half, erf(mul(x, broadcast(0.707106781f))), half);
    }
    case Activation::kGeluTanh: {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
      const Floats cubic = mul(mul(mul(x, x), x), broadcast(0.044715f));
      return mul(x, sigmoid(mul(add(x, cubic), broadcast(1.5957691216f))));
    }
  }
  return x;
}

Floats gate(const LinearArgs& args, Floats x, Floats up) {
  if (args.gate_limit > 0.0f) {  // the limit comes first, which keeps what is not a number
    const Floats limit = broadcast(args.gate_limit);
    x = min(limit, x);
    up = add(max(broadcast(-args.gate_limit), min(limit, up)), broadcast(1.0f));
  }
  return mul(activate(args.activation, x), up);
}

// Writes one row of one output tile.
void finish(const LinearArgs& args, int row, int column, Floats value) {
  const float scale = args.row_scale ? args.row_scale[row] : args.scale;
  if (args.y_row_ids) row = args.y_row_ids[row];
  if (scale != 1.0f) value = mul(value, broadcast(scale));
  if (args.soft_cap > 0.0f) value = soft_cap(value, args.soft_cap);
  float* y = args.y + row * args.y_stride + column;
  const int width = std::min(16, args.num_columns - column);
  const float* residual = args.residual ? args.residual + row * args.y_stride + column : nullptr;
  if (width == 16) {
    store(y, residual ? add(load(residual), value) : value);
    return;
  }
  float lanes[16];
  store(lanes, value);
  for (int i = 0; i < width; ++i) y[i] = residual ? residual[i] + lanes[i] : lanes[i];
}

Floats with_bias(const LinearArgs& args, int tile, const float* lanes) {
  const Floats value = load(lanes);
  return args.bias ? add(value, load(args.bias + tile * 16)) : value;
}

// What follows `rows` rows from `row` on, for `tiles` products in out [rows][tiles * 16]; when gated, a last odd product
// has its partner in `partner`.
void finish_block(const LinearArgs& args, int tile, int tiles, int row, int rows, const float* out,
                  const float* partner) {
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tiles; t += args.gated ? 2 : 1) {
      const float* first = out + (r * tiles + t) * 16;
      const Floats value = with_bias(args, tile + t, first);
      if (!args.gated) {
        finish(args, row + r, (tile + t) * 16, activate(args.activation, value));
        continue;
      }
      const Floats up = with_bias(args, tile + t + 1, partner ? partner + r * 16 : first + 16);
      finish(args, row + r, (tile + t) / 2 * 16, gate(args, value, up));
    }
}

#if defined(STROP_AMX)
template <WeightFormat kFormat>
void run_tiles_amx(const LinearArgs& args, const Activations& acts, int begin, int end, int row_begin, int row_end) {
  const WeightLayout& layout = args.layout;
  const int num_blocks = (row_end - row_begin + kMaxTileRows - 1) / kMaxTileRows;
  const int unit = args.gated ? 2 : 1;
  const size_t expanded_bytes = size_t(layout.num_groups()) * 512;
  auto* expanded = static_cast<uint8_t*>(scratch_bytes<5>(2 * expanded_bytes));
  alignas(64) float out[2][kMaxTileRows * 16];
  int configured = 0;
  for (int tile = begin; tile < end; tile += unit) {
    const uint8_t* weights[2];
    const uint8_t* codes[2];
    for (int t = 0; t < unit; ++t) {
      weights[t] = args.weights + size_t(tile + t) * layout.tile_bytes();
      codes[t] = expand_codes<coding_of(kFormat).code_bits>(layout, weights[t], expanded + t * expanded_bytes);
    }
    for (int block = 0, row = row_begin; block < num_blocks; ++block) {
      const int rows = (row_end - row + (num_blocks - block) - 1) / (num_blocks - block);
      if (rows != configured) begin_tiles(tile_config(configured = rows));
      for (int t = 0; t < unit; ++t) amx_tile<kFormat>(layout, weights[t], codes[t], acts, row, rows, out[t]);
      finish_block(args, tile, 1, row, rows, out[0], unit == 2 ? out[1] : nullptr);
      row += rows;
    }
  }
  end_tiles();
}

using AmxFn = void (*)(const LinearArgs&, const Activations&, int, int, int, int);

AmxFn pick_amx(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4: return run_tiles_amx<WeightFormat::kQ4>;
    case WeightFormat::kQ4Offset: return run_tiles_amx<WeightFormat::kQ4Offset>;
    case WeightFormat::kQ4TwoLevel: return run_tiles_amx<WeightFormat::kQ4TwoLevel>;
    case WeightFormat::kQ4Zeros: return run_tiles_amx<WeightFormat::kQ4Zeros>;
    case WeightFormat::kQ5: return run_tiles_amx<WeightFormat::kQ5>;
    case WeightFormat::kQ5Offset: return run_tiles_amx<WeightFormat::kQ5Offset>;
    case WeightFormat::kQ5TwoLevel: return run_tiles_amx<WeightFormat::kQ5TwoLevel>;
    case WeightFormat::kQ8: return run_tiles_amx<WeightFormat::kQ8>;
    case WeightFormat::kQ8Offset: return run_tiles_amx<WeightFormat::kQ8Offset>;
    case WeightFormat::kQ8TwoLevel: return run_tiles_amx<WeightFormat::kQ8TwoLevel>;
    case WeightFormat::kQ8Zeros: return run_tiles_amx<WeightFormat::kQ8Zeros>;
    default: return nullptr;
  }
}
#endif

// From so many blocks of rows on, it is the activations that are kept near and the tiles that are read again.
constexpr int kManyBlocks = 5;

// Tiles [begin, end) for rows [row_begin, row_end).
void run_tiles(const LinearArgs& args, const Activations& acts, int begin, int end, int row_begin, int row_end,
               const Stream& stream) {
  const int num_rows = row_end - row_begin;
#if defined(STROP_AMX)
  if (args.layout.quantised() && num_rows >= kMinTileRows)
    return pick_amx(args.layout.format)(args, acts, begin, end, row_begin, row_end);
#endif
  const int num_blocks = (num_rows + kMaxRows - 1) / kMaxRows;
  const size_t tile_bytes = args.layout.tile_bytes();
  const int block_tiles = tiles_for((num_rows + num_blocks - 1) / num_blocks);
  alignas(64) float out[2][kMaxRows * kMaxTiles * 16];
  // Computes one block of rows for the tiles at `tile`; returns how many there were.
  const auto compute = [&](int tile, int block) {
    int tiles = std::min(block_tiles, end - tile);
    if (tiles == 3) tiles = 2;
    const int advance = args.gated && tiles == 1 ? 2 : tiles;
    const int row = row_begin + num_rows * block / num_blocks;
    const int rows = row_begin + num_rows * (block + 1) / num_blocks - row;
    const uint8_t* weights = args.weights + size_t(tile) * tile_bytes;
    const uint8_t* ahead = block == 0 ? stream.ahead_of(weights) : nullptr;
    const TileFn fn = pick(args.layout.format, rows, tiles);
    fn(args.layout, weights, acts, row, ahead, out[0]);
    if (advance > tiles) fn(args.layout, weights + tile_bytes, acts, row, ahead ? ahead + tile_bytes : nullptr, out[1]);
    finish_block(args, tile, tiles, row, rows, out[0], advance > tiles ? out[1] : nullptr);
    return advance;
  };
  if (num_blocks < kManyBlocks) {
    for (int tile = begin, advance; tile < end; tile += advance)
      for (int block = 0; block < num_blocks; ++block) advance = compute(tile, block);
  } else {
    for (int block = 0; block < num_blocks; ++block)
      for (int tile = begin; tile < end;) tile += compute(tile, block);
  }
}

Activations prepare(const LinearArgs& args, Pool& pool) {
  const int num_rows = args.num_rows, k_len = args.layout.k_len;
  Activations acts{};
  const size_t cells = size_t(num_rows) * k_len, groups = size_t(num_rows) * (args.layout.num_groups() + 1);
  acts.pairs_stride = k_len + k_len % 2;
  // An odd number of lines: rows that a power of two parts would fight for the same few lines of L1.
  acts.codes_stride = ((k_len + 63) / 64 | 1) * 64;
  if (args.layout.quantised()) {
    const size_t codes_bytes = size_t(num_rows) * acts.codes_stride;
    auto* base = static_cast<uint8_t*>(scratch_bytes<0>(codes_bytes + groups * 12));
    acts.codes = reinterpret_cast<int8_t*>(base);
    acts.scale = reinterpret_cast<float*>(base + codes_bytes);
    acts.sum = acts.scale + groups;
    acts.zero_sum = reinterpret_cast<int32_t*>(acts.sum + groups);
  } else {
    acts.values = static_cast<float*>(scratch_bytes<0>(4 * (cells + num_rows)));
    acts.pairs = reinterpret_cast<uint16_t*>(acts.values);
  }
  constexpr int kRowsPerChunk = 8;
  pool.run((num_rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int chunk) {
    auto* normed = static_cast<float*>(scratch_bytes<1>(sizeof(float) * k_len));
    const int end = std::min(num_rows, (chunk + 1) * kRowsPerChunk);
    for (int row = chunk * kRowsPerChunk; row < end; ++row) prepare_row(args, acts, row, normed);
  });
  return acts;
}

// How a product is cut into chunks: pieces of rows, and for each of them ranges of tiles.
struct Division {
  int unit;            // tiles that must stay together
  int num_units;
  int units_per_chunk;
  int num_unit_chunks;
  int rows_per_piece;
  int num_pieces;

  Division(const LinearArgs& args, int num_threads) {
    constexpr int kRowsPerPiece = 96;
    unit = args.gated ? 2 : 1;
    num_units = args.layout.num_tiles / unit;
    rows_per_piece = std::min(args.num_rows, kRowsPerPiece);
    num_pieces = (args.num_rows + rows_per_piece - 1) / rows_per_piece;
    rows_per_piece = (args.num_rows + num_pieces - 1) / num_pieces;
    // Some tens of microseconds of work, so that a thread which loses its core delays the others little.
    const int64_t chunk_work = num_pieces == 1 ? 1'000'000 : 4'000'000;
    const int64_t unit_work = int64_t(args.layout.k_len) * kTileColumns * unit * rows_per_piece;
    const int largest = std::max(1, num_units / (num_threads * 6));
    units_per_chunk = std::clamp(int(chunk_work / (unit_work + 1)), 1, largest);
    const int most_chunks = std::max(1, Pool::kMaxChunks / num_pieces);
    units_per_chunk = std::max(units_per_chunk, (num_units + most_chunks - 1) / most_chunks);
    const int block_units = std::max(1, tiles_for(args.num_rows) / unit);  // whole blocks of tiles
    units_per_chunk = (units_per_chunk + block_units - 1) / block_units * block_units;
    num_unit_chunks = (num_units + units_per_chunk - 1) / units_per_chunk;
  }
  int num_chunks() const { return num_unit_chunks * num_pieces; }
};

// What the thread that owns `chunk` reads on from it. With several pieces of rows, a thread reads most tiles again.
Stream stream_of(const LinearArgs& args, const Division& division, const Pool& pool, int chunk) {
  const size_t unit_bytes = args.layout.tile_bytes() * division.unit;
  if (division.num_pieces > 1) return {args.weights + division.num_units * unit_bytes, nullptr, nullptr};
  const int owner = pool.owner_of(division.num_unit_chunks, chunk);
  const int end_chunk = pool.range_begin(division.num_unit_chunks, owner + 1);
  const int end_unit = std::min(division.num_units, end_chunk * division.units_per_chunk);
  Stream stream{args.weights + end_unit * unit_bytes, nullptr, nullptr};
  if (args.next_weights != nullptr) {
    stream.next = args.next_weights + args.next_bytes / 64 * owner / pool.num_threads() * 64;
    stream.next_end = args.next_weights + args.next_bytes;
  }
  return stream;
}

// One code of a tile.
int code_at(const WeightLayout& layout, const uint8_t* tile, int k, int column) {
  const int bits = coding_of(layout.format).code_bits, in = k % kGroupLen;
  const uint8_t* group = tile + size_t(k / kGroupLen) * bits * 64;
  if (bits == 8) return group[in / 4 * 64 + column * 4 + in % 4];
  const uint8_t both = group[in % 16 / 4 * 64 + column * 4 + in % 4];
  const int nibble = in < 16 ? both & 15 : both >> 4;
  if (bits == 4) return nibble;
  const int bit = column * 4 + in % 4;
  return nibble | (group[256 + in / 4 * 8 + bit / 8] >> bit % 8 & 1) << 4;
}

// One scale of a tile (part 0), or offset (part 1).
float scale_at(const WeightLayout& layout, const uint8_t* tile, int part, int group, int column) {
  const Coding coding = coding_of(layout.format);
  const uint8_t* begin = tile + layout.codes_bytes();
  const size_t at = size_t(part) * layout.num_groups() + group;
  const auto half_at = [&](const uint8_t* halves, size_t row) {
    return half_to_float(reinterpret_cast<const uint16_t*>(halves)[row * 16 + column]);
  };
  if (!coding.two_level) return half_at(begin, at);
  const uint8_t local = begin[at * 16 + column];
  const uint8_t* super = begin + size_t(layout.num_groups()) * 16 * (coding.has_offset ? 2 : 1);
  return half_at(super, at / (kSuperLen / kGroupLen)) * float(coding.has_offset ? int(local) : int(int8_t(local)));
}

}  // namespace

void linear(const LinearArgs& args) {
  if (args.num_rows == 0) return;
  Pool& pool = Pool::instance();
  const Activations acts = prepare(args, pool);
  const Division division(args, pool.num_threads());
  const bool memory_bound = division.num_pieces == 1;
  pool.expect(memory_bound ? args.next_weights : nullptr, args.next_bytes);
  pool.run(division.num_chunks(), [&](int chunk) {
    const int first_unit = chunk % division.num_unit_chunks * division.units_per_chunk;
    const int end_unit = std::min(division.num_units, first_unit + division.units_per_chunk);
    const int row_begin = chunk / division.num_unit_chunks * division.rows_per_piece;
    const int row_end = std::min(args.num_rows, row_begin + division.rows_per_piece);
    run_tiles(args, acts, first_unit * division.unit, end_unit * division.unit, row_begin, row_end,
              stream_of(args, division, pool, chunk));
  });
}

namespace {

// y = W[tokens]
void look_up(const EmbedArgs& args) {
  const WeightLayout& layout = args.layout;
  const int k_len = layout.k_len;
  for (int row = 0; row < args.num_rows; ++row) {
    const int token = args.tokens[row], column = token % 16;
    const uint8_t* tile = args.weights + size_t(token / 16) * layout.tile_bytes();
    float* y = args.y + size_t(row) * k_len;
    if (!layout.quantised()) {
      for (int k = 0; k < k_len; ++k) {
        const size_t pair = (size_t(k / 2) * 16 + column) * 2 + k % 2, at = size_t(k) * 16 + column;
        if (layout.format == WeightFormat::kBf16) y[k] = bf16_to_float(reinterpret_cast<const uint16_t*>(tile)[pair]);
        if (layout.format == WeightFormat::kF16) y[k] = half_to_float(reinterpret_cast<const uint16_t*>(tile)[at]);
        if (layout.format == WeightFormat::kF32) y[k] = reinterpret_cast<const float*>(tile)[at];
      }
      continue;
    }
    const Coding coding = coding_of(layout.format);
    for (int k = 0; k < k_len; ++k) {
      const int group = k / kGroupLen;
      const float scale = scale_at(layout, tile, 0, group, column);
      y[k] = scale * float(code_at(layout, tile, k, column) - layout.zero);
      if (coding.has_offset) y[k] += scale_at(layout, tile, 1, group, column) * (coding.has_zeros ? scale : 1.0f);
    }
  }
}

}  // namespace

void embed(const EmbedArgs& args) {
  look_up(args);
  const int k_len = args.layout.k_len;
  for (int row = 0; row < args.num_rows; ++row) {
    float* y = args.y + size_t(row) * k_len;
    if (args.scale != 1.0f)
      for (int k = 0; k < k_len; ++k) y[k] *= args.scale;
    if (args.bias != nullptr)
      for (int k = 0; k < k_len; ++k) y[k] += args.bias[k];
    if (args.residual != nullptr)
      for (int k = 0; k < k_len; ++k) y[k] += args.residual[size_t(row) * k_len + k];
  }
}

}  // namespace strop::STROP_ISA
