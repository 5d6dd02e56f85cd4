#include "ffi/operations.h"

namespace strop {
namespace {

// One product of all experts: attributes are the first one's place in the stack, then the weights' layout.
bool take_products(Operands& operands, const View<ffi::U8>& weights, int64_t k_len, int64_t num_experts,
                   ExpertProducts* products) {
  const int first = operands.attr(), format = operands.attr(), zero = operands.attr(), num_tiles = operands.attr();
  if (!operands.ok || !is_format(format) || num_experts > (1 << 20) || first < 0) return false;
  LinearArgs& args = products->first;
  args.layout = {WeightFormat(format), zero, int(k_len), num_tiles};
  const uint8_t* last;
  if (!matrix_bytes(weights, first + int(num_experts) - 1, args.layout, &last) ||
      !matrix_bytes(weights, first, args.layout, &args.weights))
    return false;
  products->weights_stride = size_t(weights.dims[1]);
  return products->weights_stride % 64 == 0;
}

// The biases of one layer's experts, of a stack [L, E, columns].
bool set_bias(const View<ffi::F32>& stack, int layer, int64_t num_experts, ExpertProducts* products) {
  const int64_t columns = int64_t(products->first.layout.num_tiles) * kTileColumns;
  if (stack.dims.size() != 3 || layer < 0 || layer >= stack.dims[0] || stack.dims[1] != num_experts ||
      stack.dims[2] != columns)
    return false;
  products->first.bias = stack.data + size_t(layer) * num_experts * columns;
  products->bias_stride = size_t(columns);
  return true;
}

}  // namespace

// x, scores, weights of gate and up, weights of down, counts, [bias of gate and up, bias of down], [residual], y.
ffi::Error Experts::decode(Operands& operands) {
  const auto x = operands.next<ffi::F32>(), scores = operands.next<ffi::F32>();
  const auto gate_up_weights = operands.next<ffi::U8>(), down_weights = operands.next<ffi::U8>();
  const auto counts = operands.next<ffi::S32>();
  if (!operands.ok || x.dims.size() != 2 || scores.dims.size() != 2 || scores.dims[0] != x.dims[0])
    return invalid("experts: x and scores need shapes [T, D], [T, E]");
  const int64_t num_experts = scores.dims[1], model_dim = x.dims[1];
  if (!take_products(operands, gate_up_weights, model_dim, num_experts, &args.gate_up))
    return invalid("experts: W of gate and up does not match its layout");
  LinearArgs& gate_up = args.gate_up.first;
  LinearArgs& down = args.down.first;
  if (gate_up.layout.num_tiles % 2 != 0) return invalid("experts: tiles of gate and up must alternate");
  gate_up.num_columns = gate_up.layout.num_tiles / 2 * kTileColumns;
  if (!take_products(operands, down_weights, gate_up.num_columns, num_experts, &args.down))
    return invalid("experts: W of down does not match its layout");
  const int layer = operands.attr(), activation = operands.attr();
  args.num_experts = int(num_experts), args.num_active = operands.attr(), args.normalise = operands.attr();
  const bool has_bias = operands.attr(), has_residual = operands.attr();
  gate_up.gate_limit = operands.float_attr(), args.scale = operands.float_attr();
  const auto gate_up_bias = has_bias ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto down_bias = has_bias ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto residual = has_residual ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto y = operands.result<ffi::F32>();
  if (!operands.all_taken()) return invalid("experts: operands of other number or type than expected");
  if (!is_activation(activation) || args.num_active < 1 || args.num_active > num_experts ||
      !(gate_up.gate_limit >= 0.0f))
    return invalid("experts: bad attributes");
  if (!same(y.dims, x.dims) || model_dim > int64_t(down.layout.num_tiles) * kTileColumns)
    return invalid("experts: y must have the shape of x and be no wider than W of down");
  if (!rows.bind(counts, 0, y.dims[0])) return invalid("experts: no such row count");
  if (has_bias && !(set_bias(gate_up_bias, layer, num_experts, &args.gate_up) &&
                    set_bias(down_bias, layer, num_experts, &args.down)))
    return invalid("experts: bad bias shape");
  if (has_residual && !same(residual.dims, y.dims)) return invalid("experts: the residual's shape must be y's");
  gate_up.activation = Activation(activation), gate_up.gated = true;
  gate_up.x = x.data, gate_up.scale = 1.0f, down.scale = 1.0f, down.num_columns = int(model_dim);
  gate_up.y_stride = gate_up.num_columns, down.y_stride = model_dim;
  args.scores = scores.data, args.residual = residual.data, args.y = y.data;
  return ffi::Error::Success();
}

const char* Experts::admit(Admitted&) { return rows.read(&args.num_rows) ? nullptr : "experts: bad row count"; }

}  // namespace strop
