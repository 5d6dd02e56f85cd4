// Times the numeric routes of docs/decisions/0001-numeric-route.md: one product like gate-up, [M, 576] x [3072, 576], and
// one like down, [M, 1536] x [576, 1536], on 2 threads. Every route reads the same packed 4-bit weights, more of them than
// the caches hold, as a step does, and rounds its activations within the time. Needs AVX-512 with VNNI and BF16.
//
//   g++ -O3 -std=c++17 -march=native -mprefer-vector-width=512 -ffp-contract=off -DSTROP_ISA=avx512_bf16 -I native
//       scripts/route_speed.cpp native/kernels/linear.cpp native/threads/pool.cpp -pthread -o route_speed
//   ./route_speed [ROUNDS]
//
// Each route is first compared with a float64 product of the exact weights; a mismatch ends the program.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/linear.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {
void linear(const LinearArgs& args);
}

namespace {

using strop::WeightLayout;
constexpr int kGroup = 32, kColumns = 16, kNumThreads = 2, kMaxRows = 12;

// Rounded activations: words are what one broadcast feeds to a dot product (four int8, two int16 or two bf16).
struct Activations {
  std::vector<int32_t> words;   // [M, G, words a group]
  std::vector<float> scale;     // [M, G]
  std::vector<float> sum;       // [M, G], factor of the weight's offset
  std::vector<int32_t> start;   // [M, G], initial value of the integer product
  std::vector<float> row_scale; // [M]
};

float largest_of(__m512 a, __m512 b) { return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b))); }

__m512i rounded(__m512 a, float inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(inverse))); }

__m512i nibbles(__m512i both, int shift) {
  return _mm512_and_si512(_mm512_srli_epi16(both, shift), _mm512_set1_epi8(15));
}

void store_int8(int32_t* words, __m512i a, __m512i b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words + 4), _mm512_cvtepi32_epi8(b));
}

// A route states: kParts parts of kVectors weight vectors make up a group; unpack one part; the activation word that
// meets vector i of a part; round a group of activations; add a product; and whether it scales every group by itself.

// int8, one scale a row.
struct Int8Row {
  static constexpr int kWords = 8, kParts = 4, kVectors = 2, kRows = 12;
  static constexpr bool kGroupScale = false, kStart = false, kRowScale = true;
  using Sum = __m512i;
  static int word(int part, int i) { return part + 4 * i; }
  static void unpack(const uint8_t* group, int part, __m512i (&v)[2]) {
    const __m512i both = _mm512_loadu_si512(group + part * 64);
    v[0] = nibbles(both, 0), v[1] = nibbles(both, 4);
  }
  static void round_group(__m512 a, __m512 b, float inverse, int32_t* words, float*, float* sum, int32_t*) {
    const __m512i qa = rounded(a, inverse), qb = rounded(b, inverse);
    store_int8(words, qa, qb);
    *sum = float(_mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb)));
  }
  static Sum dot(Sum acc, __m512i w, int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }
};

// int8-32d8: activations and codes turned by the Hadamard matrix over the eight slices of a group; codes stay exact.
struct Int8Turned {
  static constexpr int kWords = 8, kParts = 1, kVectors = 8, kRows = 8;
  static constexpr bool kGroupScale = true, kStart = true, kRowScale = false;
  static constexpr int kBias = 64;  // makes the turned codes of all slices but the first unsigned
  using Sum = __m512i;
  static int word(int, int i) { return i; }
  static void unpack(const uint8_t* group, int, __m512i (&v)[8]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i both = _mm512_loadu_si512(group + i * 64);
      const __m512i low = nibbles(both, 0), high = nibbles(both, 4);
      v[i] = _mm512_add_epi8(low, high), v[i + 4] = _mm512_sub_epi8(low, high);
    }
    // The bias on these two reaches all slices: column 0 of H is all ones.
    v[0] = _mm512_add_epi8(v[0], _mm512_set1_epi8(kBias));
    v[4] = _mm512_add_epi8(v[4], _mm512_set1_epi8(kBias));
#pragma GCC unroll 2
    for (int distance = 2; distance >= 1; distance /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        if (i & distance) continue;
        const __m512i a = v[i], b = v[i + distance];
        v[i] = _mm512_add_epi8(a, b), v[i + distance] = _mm512_sub_epi8(a, b);
      }
    v[0] = _mm512_sub_epi8(v[0], _mm512_set1_epi8(kBias));
  }
  static __m512 turn_quarters(__m512 a) {
    auto stage = [](__m512 x, __m512 swapped, __mmask16 second) {
      return _mm512_mask_sub_ps(_mm512_add_ps(x, swapped), second, swapped, x);
    };
    a = stage(a, _mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
    return stage(a, _mm512_shuffle_f32x4(a, a, 0x4e), 0xff00);
  }
  static void round_group(__m512 a, __m512 b, float, int32_t* words, float* scale, float* sum, int32_t* start) {
    const __m512 left = turn_quarters(a), right = turn_quarters(b);
    a = _mm512_add_ps(left, right), b = _mm512_sub_ps(left, right);
    const float largest = largest_of(a, b), inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const __m512i qa = rounded(a, inverse), qb = rounded(b, inverse);
    store_int8(words, qa, qb);
    const int total = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb)), first = _mm512_mask_reduce_add_epi32(15, qa);
    *scale = largest / 127.0f / 8.0f;
    *sum = largest / 127.0f * float(first);
    *start = -kBias * (total - first);
  }
  static Sum dot(Sum acc, __m512i w, int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }
};

// Nibble i of every 16-bit lane: codes of k 0 and 2 (i = 0), 16 and 18, 1 and 3, 17 and 19 of four k of a column.
struct Halves {
  static constexpr int kWords = 16, kParts = 4, kVectors = 4, kRows = 12;
  static constexpr bool kStart = false, kRowScale = false;
  static int word(int part, int i) { return i % 2 * 8 + 2 * part + i / 2; }
  static __m512 in_pairs(__m512 x) { return _mm512_permute_ps(x, 0xd8); }
};

// int16-32: nibbles widened to int16; a group's product stays below 2^24.
struct Int16Group : Halves {
  static constexpr bool kGroupScale = true;
  using Sum = __m512i;
  static void unpack(const uint8_t* group, int part, __m512i (&v)[4]) {
    const __m512i both = _mm512_loadu_si512(group + part * 64), mask = _mm512_set1_epi16(15);
    v[0] = _mm512_and_si512(both, mask);
    v[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    v[2] = _mm512_and_si512(_mm512_srli_epi16(both, 8), mask);
    v[3] = _mm512_srli_epi16(both, 12);
  }
  static void round_group(__m512 a, __m512 b, float, int32_t* words, float* scale, float* sum, int32_t*) {
    const float largest = largest_of(a, b), inverse = largest > 0 ? 32767.0f / largest : 0.0f;
    const __m512i qa = rounded(in_pairs(a), inverse), qb = rounded(in_pairs(b), inverse);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi32_epi16(qa));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8), _mm512_cvtepi32_epi16(qb));
    *scale = largest / 32767.0f;
    *sum = *scale * float(_mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb)));
  }
  static Sum dot(Sum acc, __m512i w, int32_t x) { return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x)); }
};

__m512 dot_bf16(__m512 acc, __m512i w, int32_t x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
}

// bf16 activations, codes as bf16 integers, scale afterwards.
struct Bf16Codes : Halves {
  static constexpr bool kGroupScale = false;
  using Sum = __m512;
  static void unpack(const uint8_t* group, int part, __m512i (&v)[4]) {
    // bf16 of 0..15 twice, so that the fifth index bit, which is another code's, does not matter.
    alignas(64) static const uint16_t kIntegers[32] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i table = _mm512_load_si512(kIntegers), both = _mm512_loadu_si512(group + part * 64);
    v[0] = _mm512_permutexvar_epi16(both, table);
    v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table);
    v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 8), table);
    v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 12), table);
  }
  static void round_group(__m512 a, __m512 b, float, int32_t* words, float*, float* sum, int32_t*) {
    auto store = [](int32_t* to, __m512 x) {
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(in_pairs(x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    *sum = _mm512_reduce_add_ps(_mm512_add_ps(store(words, a), store(words + 8, b)));
  }
  static Sum dot(Sum acc, __m512i w, int32_t x) { return dot_bf16(acc, w, x); }
};

// bf16 activations, weights dequantised to bf16 once per tile and kept in the core's cache while all rows use them.
struct Bf16Weights : Bf16Codes {};

__m512 to_float(__m512i a) { return _mm512_cvtepi32_ps(a); }
__m512 to_float(__m512 a) { return a; }
__m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
__m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }

__m512 load_half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// As the shipped kernel: ask for the block of tiles after the next one.
void prefetch_ahead(const uint8_t* tile, size_t block_bytes, int g, int num_groups) {
  const size_t step = block_bytes / num_groups;
  const uint8_t* ahead = tile + 2 * block_bytes + g * step;
  for (size_t line = 0; line < step; line += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
}

template <class Route, int kRows, int kTiles>
void block(const WeightLayout& layout, const uint8_t* tile, const Activations& acts, int row0, bool first_use, float* y,
           int y_stride) {
  const int num_groups = layout.num_groups();
  const size_t tile_bytes = layout.tile_bytes(), stride = size_t(num_groups) * Route::kWords;
  const int32_t* words = acts.words.data() + row0 * stride;
  const size_t at = size_t(row0) * num_groups;
  constexpr int kSplit = kRows * kTiles < 6 ? 2 : 1;  // more chains where latency would show
  __m512 acc[kTiles][kRows];
  for (auto& tile_acc : acc)
    for (auto& a : tile_acc) a = _mm512_setzero_ps();
  for (int g = 0; g < num_groups; ++g) {
    if (first_use) prefetch_ahead(tile, kTiles * tile_bytes, g, num_groups);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* weights = tile + t * tile_bytes;
      typename Route::Sum sum[kSplit][kRows] = {};
      if constexpr (Route::kStart)
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) sum[0][r] = _mm512_set1_epi32(acts.start[at + r * num_groups + g]);
#pragma GCC unroll 4
      for (int part = 0; part < Route::kParts; ++part) {
        __m512i v[Route::kVectors];
        Route::unpack(weights + size_t(g) * 256, part, v);
#pragma GCC unroll 8
        for (int i = 0; i < Route::kVectors; ++i)
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r)
            sum[i % kSplit][r] =
                Route::dot(sum[i % kSplit][r], v[i], words[r * stride + g * Route::kWords + Route::word(part, i)]);
      }
      const uint8_t* scales = weights + layout.codes_bytes() + size_t(g) * 32;
      const __m512 scale = load_half(scales), offset = load_half(scales + size_t(num_groups) * 32);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const size_t cell = at + size_t(r) * num_groups + g;
        const __m512 product = to_float(kSplit == 2 ? add(sum[0][r], sum[kSplit - 1][r]) : sum[0][r]);
        const __m512 factor = Route::kGroupScale ? _mm512_mul_ps(scale, _mm512_set1_ps(acts.scale[cell])) : scale;
        acc[t][r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(acts.sum[cell]), acc[t][r]);
        acc[t][r] = _mm512_fmadd_ps(product, factor, acc[t][r]);
      }
    }
  }
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < kRows; ++r) {
      __m512 a = acc[t][r];
      if (Route::kRowScale) a = _mm512_mul_ps(a, _mm512_set1_ps(acts.row_scale[row0 + r]));
      _mm512_storeu_ps(y + size_t(row0 + r) * y_stride + t * kColumns, a);
    }
}

// One tile as bf16 [K / 2 words][16][2], in the order of Halves' activation words.
void expand_bf16(const WeightLayout& layout, const uint8_t* tile, __m512i* out) {
  const int num_groups = layout.num_groups();
  for (int g = 0; g < num_groups; ++g) {
    prefetch_ahead(tile, layout.tile_bytes(), g, num_groups);
    const uint8_t* scales = tile + layout.codes_bytes() + size_t(g) * 32;
    const __m512 scale = load_half(scales), offset = load_half(scales + size_t(num_groups) * 32);
    auto bf16 = [&](__m512i codes, int shift) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, shift), _mm512_set1_epi32(15));
      const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, offset);
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    };
    for (int part = 0; part < 4; ++part) {
      const __m512i both = _mm512_loadu_si512(tile + size_t(g) * 256 + part * 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        out[g * 16 + Halves::word(part, i)] =
            _mm512_or_si512(bf16(both, 4 * i), _mm512_slli_epi32(bf16(both, 4 * i + 16), 16));
    }
  }
}

template <int kRows>
void expanded_block(const WeightLayout& layout, const __m512i* expanded, const Activations& acts, int row0, float* y,
                    int y_stride) {
  constexpr int kSplit = kRows < 6 ? 8 : 1;
  const size_t num_words = layout.k_len / 2;
  const int32_t* words = acts.words.data() + row0 * num_words;
  __m512 acc[kSplit][kRows] = {};
  for (size_t w = 0; w < num_words; w += kSplit)
#pragma GCC unroll 8
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) acc[s][r] = dot_bf16(acc[s][r], expanded[w + s], words[r * num_words + w + s]);
  for (int r = 0; r < kRows; ++r) {
    for (int s = 1; s < kSplit; ++s) acc[0][r] = _mm512_add_ps(acc[0][r], acc[s][r]);
    _mm512_storeu_ps(y + size_t(row0 + r) * y_stride, acc[0][r]);
  }
}

template <class Route>
void round_row(const float* x, int k_len, int row, Activations& acts) {
  const int num_groups = k_len / kGroup;
  float inverse = 0.0f;
  if constexpr (Route::kRowScale) {
    __m512 largest = _mm512_setzero_ps();
    for (int k = 0; k < k_len; k += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + k)));
    const float top = _mm512_reduce_max_ps(largest);
    inverse = top > 0 ? 127.0f / top : 0.0f;
    acts.row_scale[row] = top / 127.0f;
  }
  for (int g = 0; g < num_groups; ++g) {
    const size_t at = size_t(row) * num_groups + g;
    Route::round_group(_mm512_loadu_ps(x + g * kGroup), _mm512_loadu_ps(x + g * kGroup + 16), inverse,
                       &acts.words[at * Route::kWords], &acts.scale[at], &acts.sum[at], &acts.start[at]);
  }
}

struct Product {
  WeightLayout layout;
  const float* x;
  float* y;
  int num_rows;
  int num_columns() const { return layout.num_tiles * kColumns; }
};

// Rows in blocks of 12 and 8; M is 1 or a multiple of 8 here.
int block_rows(int left, int most) { return left == 1 ? 1 : most == 12 && (left == 12 || left >= 20) ? 12 : 8; }

template <class Route>
void run_chunk(const Product& p, const uint8_t* weights, const Activations& acts, int begin, int end, int row_begin,
               int row_end) {
  constexpr bool kExpanded = std::is_same_v<Route, Bf16Weights>;
  const size_t tile_bytes = p.layout.tile_bytes();
  const int stride = p.num_columns(), tiles = p.num_rows == 1 && !kExpanded ? 4 : 1;
  alignas(64) static thread_local __m512i expanded[1536 / 2];
  for (int tile = begin; tile < end; tile += tiles) {
    const uint8_t* w = weights + tile * tile_bytes;
    float* y = p.y + tile * kColumns;
    if constexpr (kExpanded) expand_bf16(p.layout, w, expanded);
    for (int row = row_begin; row < row_end;) {
      const int rows = block_rows(row_end - row, Route::kRows);
      const bool first = row == row_begin;
      if constexpr (kExpanded) {
        if (rows == 1) expanded_block<1>(p.layout, expanded, acts, row, y, stride);
        if (rows == 8) expanded_block<8>(p.layout, expanded, acts, row, y, stride);
        if (rows == 12) expanded_block<12>(p.layout, expanded, acts, row, y, stride);
      } else {
        if (rows == 1) block<Route, 1, 4>(p.layout, w, acts, row, first, y, stride);
        if (rows == 8) block<Route, 8, 1>(p.layout, w, acts, row, first, y, stride);
        if constexpr (Route::kRows == 12)
          if (rows == 12) block<Route, 12, 1>(p.layout, w, acts, row, first, y, stride);
      }
      row += rows;
    }
  }
}

template <class Route>
void multiply(const Product& p, const uint8_t* weights) {
  static Activations acts;
  const int num_groups = p.layout.num_groups(), k_len = p.layout.k_len;
  const size_t cells = size_t(p.num_rows) * num_groups;
  if (acts.scale.size() < cells) {
    acts.words.resize(cells * Route::kWords);
    acts.scale.resize(cells), acts.sum.resize(cells), acts.start.resize(cells);
  }
  if (acts.row_scale.size() < size_t(p.num_rows)) acts.row_scale.resize(p.num_rows);
  strop::Pool& pool = strop::Pool::instance();
  pool.run((p.num_rows + 7) / 8, [&](int chunk) {
    for (int row = chunk * 8; row < std::min(p.num_rows, chunk * 8 + 8); ++row)
      round_row<Route>(p.x + size_t(row) * k_len, k_len, row, acts);
  });
  const int rows_per_chunk = 256, num_row_chunks = (p.num_rows + rows_per_chunk - 1) / rows_per_chunk;
  int tiles = int(1'000'000 / (size_t(k_len) * kColumns * std::min(p.num_rows, rows_per_chunk)));
  tiles = std::clamp(tiles, 1, p.layout.num_tiles / (kNumThreads * 6));
  if (p.num_rows == 1) tiles = (tiles + 3) / 4 * 4;
  const int num_tile_chunks = (p.layout.num_tiles + tiles - 1) / tiles;
  pool.run(num_tile_chunks * num_row_chunks, [&](int chunk) {
    const int begin = chunk % num_tile_chunks * tiles, row_begin = chunk / num_tile_chunks * rows_per_chunk;
    run_chunk<Route>(p, weights, acts, begin, std::min(p.layout.num_tiles, begin + tiles), row_begin,
                     std::min(p.num_rows, row_begin + rows_per_chunk));
  });
}

void multiply_shipped(const Product& p, const uint8_t* weights) {
  strop::LinearArgs args{};
  args.x = p.x, args.y = p.y, args.weights = weights, args.layout = p.layout;
  args.num_rows = p.num_rows, args.num_columns = p.num_columns(), args.y_stride = args.num_columns;
  strop::STROP_ISA::linear(args);
}

struct Route {
  const char* name;
  void (*multiply)(const Product&, const uint8_t*);
  double tolerance;  // of the root mean square error, relative to that of y
};

const Route kRoutes[] = {
    {"int8-32 (shipped kernel)", multiply_shipped, 0.01},
    {"int8-32d8 (rotated)", multiply<Int8Turned>, 0.01},
    {"int16-32", multiply<Int16Group>, 1e-4},
    {"bf16, codes as integers", multiply<Bf16Codes>, 4e-3},
    {"bf16, weights expanded to bf16", multiply<Bf16Weights>, 6e-3},
    {"int8, one scale a row", multiply<Int8Row>, 0.02},
};

double weight_at(const WeightLayout& layout, const uint8_t* weights, int column, int k) {
  const uint8_t* tile = weights + size_t(column / kColumns) * layout.tile_bytes();
  const int g = k / kGroup, in = k % kGroup, lane = column % kColumns;
  const uint8_t both = tile[g * 256 + in % 16 / 4 * 64 + lane * 4 + in % 4];
  uint16_t scale, offset;
  std::memcpy(&scale, tile + layout.codes_bytes() + (g * kColumns + lane) * 2, 2);
  std::memcpy(&offset, tile + layout.codes_bytes() + ((layout.num_groups() + g) * kColumns + lane) * 2, 2);
  return double(_cvtsh_ss(scale)) * (in < 16 ? both & 15 : both >> 4) + double(_cvtsh_ss(offset));
}

void check(const Route& route, const Product& p, const uint8_t* weights) {
  std::fill(p.y, p.y + size_t(p.num_rows) * p.num_columns(), NAN);
  route.multiply(p, weights);
  double error = 0, size = 0;
  for (int row = 0; row < p.num_rows; row += std::max(1, p.num_rows / 7))
    for (int column = 0; column < p.num_columns(); column += 19) {
      double exact = 0;
      for (int k = 0; k < p.layout.k_len; ++k)
        exact += weight_at(p.layout, weights, column, k) * double(p.x[size_t(row) * p.layout.k_len + k]);
      const double off = p.y[size_t(row) * p.num_columns() + column] - exact;
      error += off * off, size += exact * exact;
    }
  const double relative = std::sqrt(error / size);
  if (!(relative < route.tolerance)) {
    std::fprintf(stderr, "route_speed: %s, M = %d, K = %d: relative error %g, allowed %g\n", route.name, p.num_rows,
                 p.layout.k_len, relative, route.tolerance);
    std::exit(1);
  }
}

void fill(const WeightLayout& layout, uint8_t* weights, std::mt19937& random) {
  std::uniform_real_distribution<float> unit(0.5f, 1.0f);
  for (int t = 0; t < layout.num_tiles; ++t) {
    uint8_t* tile = weights + t * layout.tile_bytes();
    for (size_t i = 0; i < layout.codes_bytes(); i += 4) {
      const uint32_t bits = uint32_t(random());
      std::memcpy(tile + i, &bits, 4);
    }
    for (int i = 0; i < layout.num_groups() * kColumns; ++i) {
      const float scale = 0.02f * unit(random);
      const uint16_t half = uint16_t(_cvtss_sh(scale, 0)), offset = uint16_t(_cvtss_sh(-8 * scale * unit(random), 0));
      std::memcpy(tile + layout.codes_bytes() + i * 2, &half, 2);
      std::memcpy(tile + layout.codes_bytes() + (layout.num_groups() * kColumns + i) * 2, &offset, 2);
    }
  }
}

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int argc, char** argv) {
  const int num_rounds = argc > 1 ? std::atoi(argv[1]) : 15;
  if (num_rounds < 1) {
    std::fprintf(stderr, "route_speed: ROUNDS is %s, must be at least 1\n", argv[1]);
    return 1;
  }
  strop::Pool::instance().resize(kNumThreads);
  const WeightLayout up{strop::WeightFormat::kQ4Offset, 0, 576, 192}, down{strop::WeightFormat::kQ4Offset, 0, 1536, 36};
  const size_t up_bytes = up.tile_bytes() * up.num_tiles, pair_bytes = up_bytes + down.tile_bytes() * down.num_tiles;
  const int num_pairs = int(96'000'000 / pair_bytes) + 1;
  // The slack is for prefetches past the end.
  auto* weights = static_cast<uint8_t*>(std::aligned_alloc(4096, (num_pairs * pair_bytes + (1 << 20)) / 4096 * 4096));
  std::mt19937 random(1);
  fill(up, weights, random);
  fill(down, weights + up_bytes, random);
  for (int i = 1; i < num_pairs; ++i) std::memcpy(weights + i * pair_bytes, weights, pair_bytes);

  const int kRowCounts[] = {1, 16, 32, 512};
  constexpr int kNumRoutes = sizeof(kRoutes) / sizeof(kRoutes[0]), kNumCounts = 4;
  std::vector<float> x(512 * 1536), y(512 * 3072);
  std::normal_distribution<float> normal;
  for (float& v : x) v = normal(random);
  auto products = [&](int num_rows) {
    return std::pair<Product, Product>{{up, x.data(), y.data(), num_rows}, {down, x.data(), y.data(), num_rows}};
  };
  for (const Route& route : kRoutes)
    for (int num_rows : kRowCounts) {
      const auto [first, second] = products(num_rows);
      check(route, first, weights);
      check(route, second, weights + up_bytes);
    }

  std::vector<double> times_us[kNumRoutes][kNumCounts];
  int pair = 0;
  for (int round = 0; round < num_rounds; ++round)
    for (int m = 0; m < kNumCounts; ++m)
      for (int route = 0; route < kNumRoutes; ++route) {
        const auto [first, second] = products(kRowCounts[m]);
        const int num_calls = m < 3 ? num_pairs : 3;
        const double begin_us = now_us();
        for (int call = 0; call < num_calls; ++call, pair = (pair + 1) % num_pairs) {
          kRoutes[route].multiply(first, weights + pair * pair_bytes);
          kRoutes[route].multiply(second, weights + pair * pair_bytes + up_bytes);
        }
        times_us[route][m].push_back((now_us() - begin_us) / num_calls);
      }

  std::printf("weights %.1f MB in turn, %d threads, median (least) of %d rounds\n\n", num_pairs * pair_bytes / 1e6,
              kNumThreads, num_rounds);
  std::printf("| route | M = 1: us (least); GOP/s; x shipped | M = 16 | M = 32 | M = 512 |\n|---|---|---|---|---|\n");
  for (int route = 0; route < kNumRoutes; ++route) {
    std::printf("| %s |", kRoutes[route].name);
    for (int m = 0; m < kNumCounts; ++m) {
      // Ratios within a round: what slows the machine for a while slows both.
      std::vector<double> t = times_us[route][m], ratios(t.size());
      for (size_t i = 0; i < t.size(); ++i) ratios[i] = t[i] / times_us[0][m][i];
      std::sort(t.begin(), t.end());
      std::sort(ratios.begin(), ratios.end());
      const double median_us = t[t.size() / 2], operations = 2.0 * kRowCounts[m] * (576.0 * 3072 + 1536.0 * 576);
      std::printf(" %.0f (%.0f); %.0f; %.2f |", median_us, t[0], operations / median_us / 1e3,
                  ratios[ratios.size() / 2]);
    }
    std::printf("\n");
  }
}
