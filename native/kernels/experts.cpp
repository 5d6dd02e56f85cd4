// Mixtures of experts. The rows that chose an expert are gathered for its products, and what it gives is added to them
// at once. Experts take their turns in order, so that a row's sum does not depend on the rows it shares the step with.
#include "kernels/experts.h"

#include <algorithm>
#include <cstring>

#include "kernels/scratch.h"
#include "simd/vec.h"
#include "threads/pool.h"

namespace strop::STROP_ISA {

void linear(const LinearArgs&);

namespace {

constexpr float kLog2E = 1.44269504f;

// The num_active largest of a row's scores, of equal ones the first, in descending order. Scores that are not numbers
// cost nobody his place: whatever they are, so many different experts are chosen.
void choose(const float* scores, int num_experts, int num_active, int32_t* chosen, float* best) {
  int num_chosen = 0;
  for (int e = 0; e < num_experts; ++e) {
    if (num_chosen == num_active && !(scores[e] > best[num_active - 1])) continue;
    int at = num_chosen < num_active ? num_chosen++ : num_active - 1;
    for (; at > 0 && best[at - 1] < scores[e]; --at) best[at] = best[at - 1], chosen[at] = chosen[at - 1];
    best[at] = scores[e], chosen[at] = e;
  }
}

// Up to 16 of e^(scores - largest); 0 beyond `len`.
Floats exponentials(const float* scores, int len, float largest) {
  alignas(64) float lanes[16];
  std::fill(lanes, lanes + 16, -1e30f);
  std::copy(scores, scores + std::min(len, 16), lanes);
  return exp2_nonpositive(mul(sub(load(lanes), broadcast(largest)), broadcast(kLog2E)));
}

float sum_of_exponentials(const float* scores, int len, float largest) {
  Floats total = zero_floats();
  for (int i = 0; i < len; i += 16) total = add(total, exponentials(scores + i, len - i, largest));
  return sum_lanes(total);
}

// Chooses for one row. `best` becomes the shares of the chosen, times the scale.
void route_row(const ExpertsArgs& args, int row, int32_t* chosen, float* best) {
  const float* scores = args.scores + size_t(row) * args.num_experts;
  choose(scores, args.num_experts, args.num_active, chosen, best);
  const float largest = best[0];
  const float total = args.normalise ? sum_of_exponentials(best, args.num_active, largest)
                                     : sum_of_exponentials(scores, args.num_experts, largest);
  for (int i = 0; i < args.num_active; i += 16) {
    const int len = std::min(16, args.num_active - i);
    alignas(64) float shares[16];
    store(shares, div(exponentials(best + i, len, largest), broadcast(total)));
    for (int j = 0; j < len; ++j) best[i + j] = shares[j] * args.scale;
  }
}

// Which rows chose an expert, and what share of them it has; expert e's are [begin[e], begin[e + 1]).
struct Routes {
  int32_t* begin;
  int32_t* rows;
  float* shares;

  int count(int e) const { return begin[e + 1] - begin[e]; }
};

Routes route(const ExpertsArgs& args, Pool& pool) {
  const int num_active = args.num_active;
  const size_t num_choices = size_t(args.num_rows) * num_active;
  auto* chosen = static_cast<int32_t*>(scratch_bytes<0>(4 * (4 * num_choices + args.num_experts + 1)));
  auto* best = reinterpret_cast<float*>(chosen + num_choices);
  Routes routes;
  routes.rows = reinterpret_cast<int32_t*>(best + num_choices);
  routes.shares = reinterpret_cast<float*>(routes.rows + num_choices);
  routes.begin = reinterpret_cast<int32_t*>(routes.shares + num_choices);
  constexpr int kRowsPerChunk = 16;
  pool.run((args.num_rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int chunk) {
    const int end = std::min(args.num_rows, (chunk + 1) * kRowsPerChunk);
    for (int row = chunk * kRowsPerChunk; row < end; ++row)
      route_row(args, row, chosen + size_t(row) * num_active, best + size_t(row) * num_active);
  });
  // Counted, then each put behind the last of its expert: `begin` is one ahead until the end.
  std::fill(routes.begin, routes.begin + args.num_experts + 1, 0);
  for (size_t i = 0; i < num_choices; ++i) ++routes.begin[chosen[i]];
  for (int e = 0, before = 0; e <= args.num_experts; ++e) {
    const int here = routes.begin[e];
    routes.begin[e] = before;
    before += here;
  }
  for (size_t i = 0; i < num_choices; ++i) {
    const int at = routes.begin[chosen[i]]++;
    routes.rows[at] = int32_t(i / num_active), routes.shares[at] = best[i];
  }
  std::memmove(routes.begin + 1, routes.begin, sizeof(int32_t) * args.num_experts);
  routes.begin[0] = 0;
  return routes;
}

LinearArgs product_of(const ExpertProducts& products, int e, int num_rows) {
  LinearArgs args = products.first;
  args.weights += products.weights_stride * e;
  if (args.bias != nullptr) args.bias += products.bias_stride * e;
  args.num_rows = num_rows;
  return args;
}

void tell_next(LinearArgs& args, const LinearArgs& next) {
  args.next_weights = next.weights, args.next_bytes = next.layout.tile_bytes() * next.layout.num_tiles;
}

}  // namespace

void experts(const ExpertsArgs& args) {
  if (args.num_rows == 0) return;
  const Routes routes = route(args, Pool::instance());
  const size_t num_values = size_t(args.num_rows) * args.down.first.num_columns;
  if (args.residual != nullptr) std::memcpy(args.y, args.residual, sizeof(float) * num_values);
  else std::fill(args.y, args.y + num_values, 0.0f);
  int most_rows = 0;
  for (int e = 0; e < args.num_experts; ++e) most_rows = std::max(most_rows, routes.count(e));
  auto* activated = static_cast<float*>(scratch_bytes<1>(sizeof(float) * most_rows * args.down.first.layout.k_len));
  for (int e = 0, next; e < args.num_experts; e = next) {
    for (next = e + 1; next < args.num_experts && routes.count(next) == 0; ++next) {}
    const int num_rows = routes.count(e);
    if (num_rows == 0) continue;  // at most once: `next` was chosen
    LinearArgs gate_up = product_of(args.gate_up, e, num_rows), down = product_of(args.down, e, num_rows);
    gate_up.row_ids = routes.rows + routes.begin[e], gate_up.y = activated;
    down.x = activated;
    down.y_row_ids = gate_up.row_ids, down.row_scale = routes.shares + routes.begin[e];
    down.residual = down.y = args.y;
    tell_next(gate_up, down);
    if (next < args.num_experts) tell_next(down, product_of(args.gate_up, next, 0));
    else down.next_weights = args.next_weights, down.next_bytes = args.next_bytes;
    linear(gate_up);
    linear(down);
  }
}

}  // namespace strop::STROP_ISA
