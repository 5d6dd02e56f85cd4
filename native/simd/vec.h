// Sixteen-lane vectors with one meaning on every ISA, so that a kernel is written once and compiled per ISA.
//
// Each kernel translation unit is compiled several times with STROP_ISA naming the namespace. Lane order, the order of
// additions and the use of fused multiply-add are the same everywhere; only `dot_bf16` may round differently (see there).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace strop::STROP_ISA {

inline float bf16_to_float(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t v) { return _cvtsh_ss(v); }

#if defined(__AVX512F__)

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Bytes {  // 64 bytes
  __m512i v;
};

inline Floats zero_floats() { return {_mm512_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// 16 integers of 8 bits.
template <bool kSigned>
inline Floats load_int8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes))};
}
inline Floats load_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest even
// a * 2^n for integral n <= 0.
inline Floats scale_by_power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Lane i keeps a where first <= i < last, otherwise takes b.
inline Floats select_range(Floats a, Floats b, int first, int last) {
  uint32_t lanes = (last >= 16 ? 0xffffu : (1u << (last < 0 ? 0 : last)) - 1u);
  lanes &= first <= 0 ? 0xffffu : (first >= 16 ? 0u : ~((1u << first) - 1u));
  return {_mm512_mask_blend_ps(__mmask16(lanes), b.v, a.v)};
}
// Lane i is a where sign >= 0, otherwise b.
inline Floats select_nonnegative(Floats sign, Floats a, Floats b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(sign.v, _mm512_setzero_ps(), _CMP_GE_OQ), b.v, a.v)};
}

inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline int32_t sum_lanes(Ints a) { return _mm512_reduce_add_epi32(a.v); }
inline void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
// Saturating narrowing of 16 int32 to int8.
inline void store_int8(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0f))}; }
inline Bytes high_nibbles(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(0x0f))};
}
// The same four bytes in every lane.
inline Bytes broadcast_four(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
// acc[lane] += sum over 4 of a[4 lane + j] (unsigned) * b[4 lane + j] (signed); exact.
inline Ints dot_bytes(Ints acc, Bytes a, Bytes b) { return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)}; }
// Nibbles and 16 where the byte's bit is set in the 8 bytes at p.
inline Bytes with_fifth_bits(Bytes nibbles, const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, 8);
  return {_mm512_mask_add_epi8(nibbles.v, __mmask64(bits), nibbles.v, _mm512_set1_epi8(16))};
}
// acc[lane] += sum over 4 of weights[4 lane + j] (unsigned) * acts[j] (signed); exact.
template <int kBits>
inline Ints dot_u8s8(Ints acc, Bytes weights, const int8_t* acts) {
  int32_t four;
  std::memcpy(&four, acts, 4);
  return {_mm512_dpbusd_epi32(acc.v, weights.v, _mm512_set1_epi32(four))};
}

// Sixteen ints of 0 to 255.
inline void store_uint8(uint8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// 32 bf16: lane i holds the pair (2i, 2i+1).
struct Pairs {
  __m512i v;
};
inline Pairs load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Pairs broadcast_pair(const uint16_t* p) {
  int32_t two;
  std::memcpy(&two, p, 4);
  return {_mm512_set1_epi32(two)};
}
#if defined(__AVX512BF16__)
// acc[lane] += a.lo b.lo + a.hi b.hi in float32. The instruction's own rounding; without it, two fused multiply-adds.
inline Floats dot_bf16(Floats acc, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline void store_bf16(uint16_t* p, Floats lo, Floats hi) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(hi.v, lo.v));
}
#else
inline Floats dot_bf16(Floats acc, Pairs a, Pairs b) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  __m512 r = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)), acc.v);
  return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, high)),
                          _mm512_castsi512_ps(_mm512_and_si512(b.v, high)), r)};
}
inline void store_bf16(uint16_t* p, Floats lo, Floats hi) {
  auto narrow = [](__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  };
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(lo.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), narrow(hi.v));
}
#endif

#else  // AVX2 + FMA + F16C: two halves per vector

struct Floats {
  __m256 lo, hi;
};
struct Ints {
  __m256i lo, hi;
};
struct Bytes {
  __m256i lo, hi;
};

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Floats load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
template <bool kSigned>
inline Floats load_int8(const uint8_t* p) {
  auto half = [](const uint8_t* q) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
    return _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  };
  return {half(p), half(p + 8)};
}
inline Floats load_bf16(const uint16_t* p) {
  auto half = [](const uint16_t* q) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  };
  return {half(p), half(p + 8)};
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Floats round(Floats a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Ints to_ints(Floats a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline Floats scale_by_power_of_two(Floats a, Floats n) {
  auto half = [](__m256 x, __m256 e) {
    // Below 2^-126 the factor becomes 0, as a flushed denormal would.
    __m256i i = _mm256_cvtps_epi32(_mm256_max_ps(e, _mm256_set1_ps(-127.0f)));
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
  };
  return {half(a.lo, n.lo), half(a.hi, n.hi)};
}
inline Floats select_range(Floats a, Floats b, int first, int last) {
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  auto half = [&](__m256 x, __m256 y, int base) {
    __m256i lane = _mm256_add_epi32(low, _mm256_set1_epi32(base));
    __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                     _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(in));
  };
  return {half(a.lo, b.lo, 0), half(a.hi, b.hi, 8)};
}
inline Floats select_nonnegative(Floats sign, Floats a, Floats b) {
  return {_mm256_blendv_ps(a.lo, b.lo, sign.lo), _mm256_blendv_ps(a.hi, b.hi, sign.hi)};  // by the sign bit
}

inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline int32_t sum_lanes(Ints a) {
  __m256i eight = _mm256_add_epi32(a.lo, a.hi);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline void store(int32_t* p, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
inline Ints load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store_int8(int8_t* p, Ints a) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline Bytes load_bytes(const void* p) {
  auto q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_bytes(void* p, Bytes a) {
  auto q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
inline Bytes low_nibbles(Bytes a) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline Bytes high_nibbles(Bytes a) {
  return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
inline Bytes broadcast_four(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
inline Ints dot_bytes(Ints acc, Bytes a, Bytes b) {  // maddubs would saturate: widen even and odd bytes
  auto half = [](__m256i sum, __m256i x, __m256i y) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  };
  return {half(acc.lo, a.lo, b.lo), half(acc.hi, a.hi, b.hi)};
}
inline Bytes with_fifth_bits(Bytes nibbles, const uint8_t* p) {
  auto half = [](__m256i a, const uint8_t* q) {
    int32_t bits;
    std::memcpy(&bits, q, 4);
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    return _mm256_or_si256(a, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit_of), _mm256_set1_epi8(16)));
  };
  return {half(nibbles.lo, p), half(nibbles.hi, p + 4)};
}
template <int kBits>
inline Ints dot_u8s8(Ints acc, Bytes weights, const int8_t* acts) {
  const Bytes a = broadcast_four(acts);
  if constexpr (kBits == 8) return dot_bytes(acc, weights, a);
  auto half = [&](__m256i sum, __m256i w) {  // 2 * 127 * 128 fits int16: no saturation
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a.lo), _mm256_set1_epi16(1)));
  };
  return {half(acc.lo, weights.lo), half(acc.hi, weights.hi)};
}
inline void store_uint8(uint8_t* p, Ints a) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
  __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

struct Pairs {
  __m256i lo, hi;
};
inline Pairs load_pairs(const uint16_t* p) {
  auto q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Pairs broadcast_pair(const uint16_t* p) {
  int32_t two;
  std::memcpy(&two, p, 4);
  return {_mm256_set1_epi32(two), _mm256_set1_epi32(two)};
}
inline Floats dot_bf16(Floats acc, Pairs a, Pairs b) {
  auto half = [](__m256 sum, __m256i x, __m256i y) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                          _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), sum);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)),
                           _mm256_castsi256_ps(_mm256_and_si256(y, high)), sum);
  };
  return {half(acc.lo, a.lo, b.lo), half(acc.hi, a.hi, b.hi)};
}
inline void store_bf16(uint16_t* p, Floats lo, Floats hi) {
  float values[32];
  store(values, lo);
  store(values + 16, hi);
  for (int i = 0; i < 32; ++i) p[i] = float_to_bf16(values[i]);
}
#endif

// Lanes added in a fixed tree: (0+8, 1+9, ...), then halves again. The same on every ISA.
inline float sum_lanes(Floats a) {
  float t[16];
  store(t, a);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}
inline float max_lanes(Floats a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.v);
#else
  __m256 m = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
#endif
}

// 2^x for x <= 0, relative error below 2e-7; -inf gives 0. Cephes-style: split off the integer, polynomial on [-1/2, 1/2].
inline Floats exp2_nonpositive(Floats x) {
  x = max(x, broadcast(-150.0f));
  Floats n = round(x);
  Floats f = sub(x, n);
  Floats p = broadcast(1.5403530e-4f);
  p = fma(p, f, broadcast(1.3333558e-3f));
  p = fma(p, f, broadcast(9.6181291e-3f));
  p = fma(p, f, broadcast(5.5504109e-2f));
  p = fma(p, f, broadcast(2.4022651e-1f));
  p = fma(p, f, broadcast(6.9314718e-1f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}

inline Floats sigmoid(Floats x) {
  // exp(-|x|) keeps the exponent nonpositive on both sides.
  const Floats e = exp2_nonpositive(mul(abs(x), broadcast(-1.44269504f)));
  const Floats one = broadcast(1.0f);
  return select_nonnegative(x, div(one, add(one, e)), div(e, add(one, e)));
}

// cap * tanh(x / cap); tanh(u) = 2 sigmoid(2 u) - 1
inline Floats soft_cap(Floats x, float cap) {
  const Floats s = sigmoid(mul(x, broadcast(2.0f / cap)));
  return mul(sub(add(s, s), broadcast(1.0f)), broadcast(cap));
}

}  // namespace strop::STROP_ISA
