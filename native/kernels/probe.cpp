#include "kernels/probe.h"

#include "kernels/kernels.h"
#include "simd/vec.h"

namespace strop::STROP_ISA {
namespace {

// Chains enough to hide an instruction's latency, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kChains = 12;
inline void forget(Bytes& a) { asm volatile("" : "+v"(a.v)); }
#else
constexpr int kChains = 6;
inline void forget(Bytes& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }
#endif
constexpr int kUnroll = 8;

// One chain's product of 64 pairs of bytes.
struct Int8 {
  static constexpr int kProducts = 64;
  using Sum = Ints;
  Bytes weights = load_bytes(kWeights);
  alignas(64) static constexpr uint8_t kWeights[64] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 3};
  static constexpr int8_t kActs[4] = {1, -2, 3, -4};
  Sum zero() const { return zero_ints(); }
  Sum step(Sum sum) const { return dot_u8s8<4>(sum, weights, kActs); }
  void next() { forget(weights); }  // or what does not depend on the sum would be computed once for all chains
  static float value(Sum sum) { return sum_lanes(to_floats(sum)); }
};

struct Bf16 {
  static constexpr int kProducts = 32;
  using Sum = Floats;
  alignas(64) static constexpr uint16_t kPairs[32] = {0x3f80, 0xbf80, 0x3f00, 0xbf00};
  Bytes a = load_bytes(kPairs);
  Sum zero() const { return zero_floats(); }
  Sum step(Sum sum) const {
    Pairs pairs;
    static_assert(sizeof pairs == sizeof a);
    std::memcpy(&pairs, &a, sizeof a);
    return dot_bf16(sum, pairs, pairs);
  }
  void next() {}
  static float value(Sum sum) { return sum_lanes(sum); }
};

struct F32 {
  static constexpr int kProducts = 16;
  using Sum = Floats;
  Floats a = broadcast(0.999f), b = broadcast(1.001f);
  Sum zero() const { return broadcast(1.0f); }
  Sum step(Sum sum) const { return fma(sum, a, b); }
  void next() {}
  static float value(Sum sum) { return sum_lanes(sum); }
};

template <class Kind>
int64_t repeat(int64_t num_rounds) {
  Kind kind;
  typename Kind::Sum sums[kChains];
  for (auto& sum : sums) sum = kind.zero();
  for (int64_t round = 0; round < num_rounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) {
        sums[chain] = kind.step(sums[chain]);
        kind.next();
      }
    }
  }
  float total = 0.0f;
  for (const auto& sum : sums) total += Kind::value(sum);
  asm volatile("" : : "x"(total));
  return num_rounds * kUnroll * kChains * Kind::kProducts * 2;
}

int64_t products(ProductKind kind, int64_t num_rounds) {
  switch (kind) {
    case ProductKind::kInt8: return repeat<Int8>(num_rounds);
    case ProductKind::kBf16: return repeat<Bf16>(num_rounds);
    case ProductKind::kF32: return repeat<F32>(num_rounds);
  }
  return 0;
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
  constexpr int kLoads = 8;
  Ints sums[kLoads];
  for (auto& sum : sums) sum = zero_ints();
  const auto* words = reinterpret_cast<const int32_t*>(data);
  const int64_t num_words = num_bytes / 4;
  int64_t at = 0;
  for (; at + 16 * kLoads <= num_words; at += 16 * kLoads) {
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i) sums[i] = add(sums[i], load_ints(words + at + 16 * i));
  }
  int32_t lanes[16];
  for (int i = 1; i < kLoads; ++i) sums[0] = add(sums[0], sums[i]);
  store(lanes, sums[0]);
  uint64_t total = 0;
  for (const int32_t lane : lanes) total += uint32_t(lane);
  for (at *= 4; at < num_bytes; ++at) total += data[at];
  return total;
}

}  // namespace

extern const ProbeKernels kProbe;
const ProbeKernels kProbe = {products, read};

}  // namespace strop::STROP_ISA
