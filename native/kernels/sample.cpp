// Sampling. Loops over the vocabulary run in blocks of 64 with integer reductions, which a compiler vectorises for any
// ISA without licence to reorder float additions; float sums keep 16 lanes of their own, so that every ISA adds alike.
#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#ifdef STROP_ISA
namespace strop::STROP_ISA {
#else
namespace strop {
#endif

namespace {

constexpr int kBlock = 64;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kFloatMax = std::numeric_limits<float>::max();
constexpr float kMinTemperature = 1e-5f;
constexpr int kBandTokens = 512;  // so few that sorting them costs less than another sweep

enum { kTemperature, kTopP, kMinP, kRepetition, kPresence, kFrequency, kNumFloats };
enum { kTopK, kSeedLo, kSeedHi, kPosition, kNumInts };

// A loop with a call in it is not vectorised, so these are inlined whatever their size.
#define STROP_INLINE inline __attribute__((always_inline))

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Integers that compare as the floats do; -0 equals +0.
inline int32_t ordered(float x) {
  const int32_t bits = bits_of(x);
  return bits < 0 ? int32_t(0x80000000u - uint32_t(bits)) : bits;
}
inline float value_of_order(int32_t order) { return float_of(order < 0 ? int32_t(0x80000000u - uint32_t(order)) : order); }
inline float smaller(float a, float b) { return a < b ? a : b; }
// Bounds inside long formulas are on integers: of a float compared with a constant the compiler makes a branch.
inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Sorts by descending value, then ascending token id. A type of this file's own: the std algorithms over it stay in
// this translation unit, and code for one ISA can never be linked into another's.
struct Key {
  uint64_t v;
  bool operator<(const Key& other) const { return v < other.v; }
};
inline Key key_of(float x, uint32_t id) { return {uint64_t(uint32_t(ordered(x)) ^ 0x7fffffffu) << 32 | id}; }
inline uint32_t id_of(Key key) { return uint32_t(key.v); }
inline float value_of(Key key) { return value_of_order(int32_t(uint32_t(key.v >> 32) ^ 0x7fffffffu)); }

// e^x for x <= 0 (Cephes); below -87 it stays at 1.6e-38, which no sum here feels.
STROP_INLINE float exp_nonpositive(float x) {
  const float bounded = float_of(int32_t(smaller(uint32_t(bits_of(x)), 0xc2ae0000u)));  // the bits of -87
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // the sum's low bits are the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((int32_t(n) + 127) << 23);
}

// Natural logarithm of a positive normal float (Cephes).
STROP_INLINE float log_positive(float x) {
  const int32_t bits = bits_of(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // x = m 2^exponent, sqrt(1/2) <= m < sqrt(2)
  const float m = float_of(bits - int32_t(uint32_t(exponent) << 23)) - 1.0f;
  const float e = float(exponent);
  const float square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float tail = p * m * square + e * -2.12194440e-4f - 0.5f * square;
  return m + tail + e * 0.693359375f;
}

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

struct Draw {
  uint32_t first, second;
  explicit Draw(const uint32_t* ints) : first(chain(0x9e3779b9u, ints)), second(chain(0x7f4a7c15u, ints)) {}
  static uint32_t chain(uint32_t constant, const uint32_t* ints) {
    return mix(mix(mix(constant ^ ints[kSeedLo]) ^ ints[kSeedHi]) ^ ints[kPosition]);
  }
  // 31 random bits of a token; the smaller they are, the larger its noise.
  STROP_INLINE int32_t half(uint32_t token) const { return int32_t(mix(mix(token ^ first) + second) >> 1); }
};
STROP_INLINE float gumbel_of(int32_t half) {
  const uint32_t bounded = smaller(uint32_t(half), 0x7fffffbfu);  // the largest that rounds to 2^31 (1 - 2^-24)
  const float v = (float(int32_t(bounded)) + 0.5f) * 0x1p-31f;
  const float w = 1.0f - v;
  const float lost = v - (1.0f - w);  // log1p: what rounding took from w
  return -log_positive(lost - log_positive(w));
}

struct Largest {
  int32_t order;  // `ordered` value
  bool has_nan;
};

Largest find_largest(const float* x, int n) {
  int32_t largest = INT32_MIN, nan = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t bits = bits_of(x[i]);
    const int32_t order = ordered(x[i]);
    largest = order > largest ? order : largest;
    nan |= 0x7f800000 - (bits & 0x7fffffff);  // negative for a NaN
  }
  return {largest, nan < 0};
}

// First index with at least this value: 64 at a time, then one by one.
int find_at_least(const float* x, int n, float least) {
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    int32_t hit = 0;
    for (int j = 0; j < kBlock; ++j) hit |= -int32_t(x[i + j] >= least);
    if (hit != 0) break;
  }
  for (; i < n; ++i)
    if (x[i] >= least) return i;
  return -1;
}

// Largest value, at most FLT_MAX, and its lowest index; index -1 when there is a NaN or nothing above -inf.
struct Best {
  float value;
  int32_t id;
};
Best find_best(const float* x, int n) {
  const Largest largest = find_largest(x, n);
  if (largest.has_nan || largest.order == ordered(-kInf)) return {kNan, -1};
  const float value = smaller(value_of_order(largest.order), kFloatMax);
  return {value, find_at_least(x, n, value)};
}

template <typename Term>  // term(i) -> float
float sum_lanes(int n, Term term) {
  float lanes[16] = {};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += term(i + j);
  for (; i < n; ++i) lanes[i % 16] += term(i);
  for (int width = 8; width >= 1; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

// Keys of the tokens with lo <= z < hi, by ascending id.
int collect(const float* z, int n, float lo, float hi, Key* keys) {
  int count = 0;
  for (int base = 0; base < n; base += kBlock) {
    const int len = std::min(kBlock, n - base);
    int32_t hit = 0;
    if (len == kBlock)
      for (int j = 0; j < kBlock; ++j) hit |= -int32_t(z[base + j] >= lo) & -int32_t(z[base + j] < hi);
    else
      hit = 1;
    if (hit == 0) continue;
    for (int i = base; i < base + len; ++i) {
      keys[count] = key_of(z[i], uint32_t(i));
      count += (z[i] >= lo) & (z[i] < hi);
    }
  }
  return count;
}

// Puts the keys of the k largest values first, the smallest of these at k - 1.
void collect_top_k(const float* z, int n, int k, Key* keys) {
  // Maxima of disjoint sets: k of them reach the k-th largest maximum, so the k largest values do as well.
  const int rounds = std::max(1, n / std::max(4 * k, kBandTokens));
  const int span = rounds * kBlock;
  int num_sets = 0;
  for (int base = 0; base < n; base += span) {
    float largest[kBlock];
    std::fill(largest, largest + kBlock, -kInf);
    const int end = std::min(n, base + span);
    int i = base;
    for (; i + kBlock <= end; i += kBlock)
      for (int j = 0; j < kBlock; ++j) largest[j] = z[i + j] > largest[j] ? z[i + j] : largest[j];
    for (int j = 0; i + j < end; ++j) largest[j] = std::max(largest[j], z[i + j]);
    const int len = std::min(kBlock, end - base);
    for (int j = 0; j < len; ++j) keys[num_sets++] = key_of(largest[j], 0);
  }
  std::nth_element(keys, keys + (k - 1), keys + num_sets);  // num_sets >= k by the choice of rounds
  const int count = collect(z, n, value_of(keys[k - 1]), kInf, keys);
  std::nth_element(keys, keys + (k - 1), keys + count);
}

// Last of the sorted keys that is needed to bring `mass` up to `target`.
Key last_needed(const Key* keys, int count, const float* probability, double mass, double target) {
  for (int i = 0; i < count; ++i) {
    mass += probability[id_of(keys[i])];
    if (mass >= target) return keys[i];
  }
  return keys[count - 1];
}

// Last token of the smallest set with top_p of the mass. Only a narrow band of values is ever sorted.
Key find_top_p(const float* z, const float* probability, int n, float total, float top_p, Key* keys) {
  const float target = top_p * total;
  const auto mass_from = [&](float least) {
    return sum_lanes(n, [&](int i) { return float_of(bits_of(probability[i]) & -int32_t(z[i] >= least)); });
  };
  const auto count_from = [&](float least) {
    int32_t count = 0;
    for (int i = 0; i < n; ++i) count += z[i] >= least;
    return count;
  };
  // n tokens of probability e^lo / total or less weigh less than the 1 - top_p that may go.
  float lo = log_positive(std::max((1.0f - top_p) * total / float(n), 1e-30f)) - 0.01f;
  float hi = kInf;
  float mass_hi = 0.0f;  // of tokens from hi up
  int num_lo = count_from(lo), num_hi = 0;
  for (int step = 0; num_lo - num_hi > kBandTokens && step < 24; ++step) {
    const float middle = hi == kInf ? 0.5f * lo : 0.5f * (lo + hi);
    const float mass = mass_from(middle);
    if (mass >= target) {
      lo = middle;
      num_lo = count_from(lo);
    } else {
      hi = middle;
      mass_hi = mass;
      num_hi = count_from(hi);
    }
  }
  const int count = collect(z, n, lo, hi, keys);
  std::sort(keys, keys + count);
  return last_needed(keys, count, probability, mass_hi, target);
}

// Largest z + gumbel among the tokens up to `last` in key order and from `floor` up. z is padded with -inf to kBlock.
int32_t draw(const float* z, int n, const Draw& noise, Key last, float floor, int32_t argmax) {
  const float last_value = value_of(last);
  const uint32_t last_id = id_of(last);
  floor = std::max(floor, last_value);
  int32_t best = argmax;
  float best_score = z[argmax] + gumbel_of(noise.half(uint32_t(argmax)));
  int32_t half[kBlock];
  float score[kBlock];
  for (int base = 0; base < n; base += kBlock) {
    int32_t order = INT32_MIN;
    for (int j = 0; j < kBlock; ++j) order = ordered(z[base + j]) > order ? ordered(z[base + j]) : order;
    const float largest = value_of_order(order);
    if (largest < floor) continue;
    int32_t smallest = INT32_MAX;
    for (int j = 0; j < kBlock; ++j) {
      half[j] = noise.half(uint32_t(base + j));
      smallest = half[j] < smallest ? half[j] : smallest;
    }
    // Noise is at most -log(v): nearly every block is out by its integers alone.
    if (float(smallest) * 0x1p-31f > 1.001f * exp_nonpositive(smaller(largest - best_score, 0.0f))) continue;
    for (int j = 0; j < kBlock; ++j) score[j] = z[base + j] + gumbel_of(half[j]);
    for (int j = 0; j < kBlock; ++j) {
      const float value = z[base + j];
      const int32_t id = base + j;
      const bool kept = value >= floor && (value > last_value || uint32_t(id) <= last_id);
      if (kept && (score[j] > best_score || (score[j] == best_score && id < best))) {
        best = id;
        best_score = score[j];
      }
    }
  }
  return best;
}

// `edited` may be `z` itself; `largest` is the best of `edited`.
int32_t sample_row(const float* edited, Best largest, const float* floats, const uint32_t* ints, int n, float* z,
                   float* probability, Key* keys) {
  const float temperature = std::max(floats[kTemperature], kMinTemperature);
  const float top = largest.value;
  for (int i = 0; i < n; ++i) z[i] = (smaller(edited[i], kFloatMax) - top) / temperature;
  for (int i = n; i % kBlock != 0; ++i) z[i] = -kInf;

  Key last = key_of(-kInf, UINT32_MAX);  // keeps all
  const uint32_t top_k = ints[kTopK];
  const float top_p = floats[kTopP];
  if (top_k > 0 && top_k < uint32_t(n)) {
    const int count = int(top_k);
    collect_top_k(z, n, count, keys);
    last = keys[count - 1];
    if (top_p < 1.0f) {
      std::sort(keys, keys + count);
      double total = 0.0;
      for (int i = 0; i < count; ++i) {
        const uint32_t id = id_of(keys[i]);
        probability[id] = exp_nonpositive(z[id]);
        total += probability[id];
      }
      last = last_needed(keys, count, probability, 0.0, top_p * total);
    }
  } else if (top_p < 1.0f) {
    for (int i = 0; i < n; ++i) probability[i] = exp_nonpositive(z[i]);
    const float total = sum_lanes(n, [&](int i) { return probability[i]; });
    last = find_top_p(z, probability, n, total, top_p, keys);
  }
  const float floor = floats[kMinP] > 0.0f ? std::log(floats[kMinP]) : -kInf;
  return draw(z, n, Draw(ints), last, floor, largest.id);
}

struct EditRange {
  int begin, end;
};
EditRange edits_of(const SampleArgs& args, int row) {
  const auto before = [](int32_t edit_row, uint32_t wanted) { return uint32_t(edit_row) < wanted; };  // -1 is last
  const int32_t* end = args.edit_row + args.num_edits;
  const int32_t* first = std::lower_bound(args.edit_row, end, uint32_t(row), before);
  const int32_t* last = std::lower_bound(first, end, uint32_t(row) + 1, before);
  return {int(first - args.edit_row), int(last - args.edit_row)};
}

void apply_edits(const SampleArgs& args, EditRange edits, const float* floats, float* logits) {
  for (int e = edits.begin; e < edits.end; ++e) {
    if (uint32_t(args.edit_token[e]) >= uint32_t(args.vocab_size)) continue;
    float value = smaller(logits[args.edit_token[e]], kFloatMax);
    if (args.edit_seen[e] > 0) value = value > 0.0f ? value / floats[kRepetition] : value * floats[kRepetition];
    if (args.edit_count[e] > 0) value -= floats[kPresence];
    value -= floats[kFrequency] * float(args.edit_count[e]);
    logits[args.edit_token[e]] = smaller(value + args.edit_bias[e], kFloatMax);
  }
}

// `logits` has room for whole words.
void forbid(const uint32_t* allowed, int mask_words, float* logits) {
  const int32_t forbidden = bits_of(-kInf);
  for (int word = 0; word < mask_words; ++word)
    for (int j = 0; j < 32; ++j) {
      const int32_t kept = -int32_t(allowed[word] >> j & 1);
      logits[32 * word + j] = float_of((bits_of(logits[32 * word + j]) & kept) | (forbidden & ~kept));
    }
}

// The num_top largest by (value descending, id ascending), into sorted keys; returns how many there are.
int find_top(const float* x, int n, int num_top, Key* keys) {
  int count = 0;
  float least = -kInf;  // once the list is full, a newcomer must exceed its last
  for (int base = 0; base < n; base += kBlock) {
    const int len = std::min(kBlock, n - base);
    if (count == num_top && len == kBlock) {
      int32_t hit = 0;
      for (int j = 0; j < kBlock; ++j) hit |= -int32_t(x[base + j] > least);
      if (hit == 0) continue;
    }
    for (int i = base; i < base + len; ++i) {
      const float value = smaller(x[i], kFloatMax);
      if (count == num_top && !(value > least)) continue;
      const Key key = key_of(value, uint32_t(i));
      int at = count < num_top ? count++ : num_top - 1;
      for (; at > 0 && key < keys[at - 1]; --at) keys[at] = keys[at - 1];
      keys[at] = key;
      if (count == num_top) least = value_of(keys[num_top - 1]);
    }
  }
  return count;
}

void write_logprobs(const SampleArgs& args, int row, const float* raw, Best largest, Key* keys) {
  const int n = args.vocab_size, num_top = args.num_top;
  int32_t* top_ids = args.top_ids + size_t(row) * num_top;
  float* top_logprobs = args.top_logprobs + size_t(row) * num_top;
  if (largest.id < 0) {
    args.logprobs[row] = kNan;
    std::fill(top_ids, top_ids + num_top, -1);
    std::fill(top_logprobs, top_logprobs + num_top, kNan);
    return;
  }
  const auto shifted = [&](int i) { return smaller(raw[i], kFloatMax) - largest.value; };
  const float log_sum = log_positive(sum_lanes(n, [&](int i) { return exp_nonpositive(shifted(i)); }));
  const int32_t chosen = args.token_ids[row];
  args.logprobs[row] = chosen < 0 ? kNan : shifted(chosen) - log_sum;
  const int count = find_top(raw, n, num_top, keys);
  for (int i = 0; i < num_top; ++i) {
    top_ids[i] = i < count ? int32_t(id_of(keys[i])) : -1;
    top_logprobs[i] = i < count ? shifted(top_ids[i]) - log_sum : -kInf;
  }
}

}  // namespace

void sample_rows(const SampleArgs& args, int row_begin, int row_end, void* scratch) {
  const int n = args.vocab_size;
  const size_t stride = (size_t(n) + kBlock - 1) / kBlock * kBlock;
  float* z = static_cast<float*>(scratch);
  float* probability = z + stride;
  Key* keys = reinterpret_cast<Key*>(probability + stride);
  for (int row = row_begin; row < row_end; ++row) {
    const float* raw = args.logits + size_t(row) * n;
    const float* floats = args.floats + size_t(row) * kNumFloats;
    const Best largest = find_best(raw, n);
    Best edited_largest = largest;
    const float* edited = raw;
    const EditRange edits = edits_of(args, row);
    if (largest.id >= 0 && (edits.begin < edits.end || args.mask_words > 0)) {
      std::memcpy(z, raw, sizeof(float) * n);
      apply_edits(args, edits, floats, z);
      forbid(args.allowed + size_t(row) * args.mask_words, args.mask_words, z);
      edited = z;
      edited_largest = find_best(z, n);
    }
    int32_t token = edited_largest.id;
    if (token >= 0 && floats[kTemperature] > 0.0f)
      token = sample_row(edited, edited_largest, floats, args.ints + size_t(row) * kNumInts, n, z, probability, keys);
    args.token_ids[row] = token;
    if (args.num_top > 0)
      write_logprobs(args, row, raw, largest, keys);
    else
      args.logprobs[row] = 0.0f;
  }
}

void greedy_rows(const float* logits, int vocab_size, int32_t* token_ids, int row_begin, int row_end) {
  for (int row = row_begin; row < row_end; ++row)
    token_ids[row] = find_best(logits + size_t(row) * vocab_size, vocab_size).id;
}

}
