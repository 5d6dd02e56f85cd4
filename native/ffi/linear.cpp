#include "ffi/operations.h"

namespace strop {

// x, weights, counts, [y], [norm], [bias], [residual], [row ids], [y]: given first where another linear has written
// columns of it, else a result.
ffi::Error Linear::decode(Operands& operands) {
  const auto x = operands.next<ffi::F32>();
  const auto weights = operands.next<ffi::U8>();
  const auto counts = operands.next<ffi::S32>();
  const int index = operands.attr(), layer = operands.attr();
  const int format = operands.attr(), zero = operands.attr(), num_tiles = operands.attr();
  const int count_index = operands.attr(), num_columns = operands.attr(), first_column = operands.attr();
  const bool has_bias = operands.attr(), has_residual = operands.attr(), has_row_ids = operands.attr();
  const int activation = operands.attr();
  args.gated = operands.attr();
  args.scale = operands.float_attr(), args.soft_cap = operands.float_attr();
  if (!is_format(format) || !is_activation(activation))
    return invalid("linear: bad attributes");
  args.activation = Activation(activation);
  const auto given = first_column > 0 ? operands.next<ffi::F32>() : View<ffi::F32>{};
  if (!take_norm(operands, &args.norm)) return invalid("linear: bad norm");
  const auto bias = has_bias ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto residual = has_residual ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto row_ids = has_row_ids ? operands.next<ffi::S32>() : View<ffi::S32>{};
  const auto y = first_column > 0 ? given : operands.result<ffi::F32>();
  if (!operands.all_taken()) return invalid("linear: operands of other number or type than expected");
  if (x.dims.size() != 2 || y.dims.size() != 2) return invalid("linear: x and y need shapes [T, K], [T, N]");
  if (y.dims[0] != (has_row_ids ? row_ids.count() : x.dims[0])) return invalid("linear: x and y differ in rows");
  args.layout = {WeightFormat(format), zero, int(x.dims[1]), num_tiles};
  const int64_t columns = int64_t(num_tiles) * kTileColumns;
  if (num_columns <= 0 || num_columns > columns / (args.gated ? 2 : 1)) return invalid("linear: y is wider than W");
  if (first_column < 0 || num_columns > y.dims[1] - first_column) return invalid("linear: y is narrower than W");
  if (!rows.bind(counts, count_index, y.dims[0])) return invalid("linear: no such row count");
  if (!matrix_bytes(weights, index, args.layout, &args.weights)) return invalid("linear: W does not match its layout");
  if (args.norm.weight != nullptr && args.norm.len != x.dims[1]) return invalid("linear: bad norm shape");
  const int64_t all_columns = (y.dims[1] * (args.gated ? 2 : 1) + kTileColumns - 1) / kTileColumns * kTileColumns;
  if (has_bias && (first_column + columns > all_columns || !(args.bias = row_floats(bias, layer, all_columns))))
    return invalid("linear: bad bias shape");
  if (has_residual && !same(residual.dims, y.dims))
    return invalid("linear: the residual's shape must be y's");
  args.x = x.data, args.row_ids = row_ids.data, args.y = y.data + first_column;
  args.residual = has_residual ? residual.data + first_column : nullptr;
  if (has_bias) args.bias += first_column;
  args.num_columns = num_columns, args.y_stride = y.dims[1], num_x_rows = x.dims[0];
  return ffi::Error::Success();
}

const char* Linear::admit(Admitted&) {
  if (!rows.read(&args.num_rows)) return "linear: bad row count";
  for (int row = 0; args.row_ids != nullptr && row < args.num_rows; ++row)
    if (args.row_ids[row] < 0 || args.row_ids[row] >= num_x_rows) return "linear: a row id is out of range";
  return nullptr;
}

// tokens, weights, counts, [bias], [residual], y.
ffi::Error Embed::decode(Operands& operands) {
  const auto tokens = operands.next<ffi::S32>();
  const auto weights = operands.next<ffi::U8>();
  const auto counts = operands.next<ffi::S32>();
  const int format = operands.attr(), zero = operands.attr(), num_tiles = operands.attr();
  args.scale = operands.float_attr();
  const bool has_bias = operands.attr(), has_residual = operands.attr();
  const auto bias = has_bias ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto residual = has_residual ? operands.next<ffi::F32>() : View<ffi::F32>{};
  const auto y = operands.result<ffi::F32>();
  if (!operands.all_taken()) return invalid("embed: operands of other number or type than expected");
  if (!is_format(format)) return invalid("embed: bad attributes");
  if (y.dims.size() != 2 || tokens.count() != y.dims[0]) return invalid("embed: y needs shape [T, D]");
  args.layout = {WeightFormat(format), zero, int(y.dims[1]), num_tiles};
  if (!rows.bind(counts, 0, y.dims[0])) return invalid("embed: no such row count");
  if (!matrix_bytes(weights, 0, args.layout, &args.weights)) return invalid("embed: W does not match its layout");
  if (has_bias && !(args.bias = row_floats(bias, 0, y.dims[1]))) return invalid("embed: bad bias shape");
  if (has_residual && !same(residual.dims, y.dims)) return invalid("embed: the residual's shape must be y's");
  args.residual = residual.data;
  args.tokens = tokens.data, args.y = y.data;
  return ffi::Error::Success();
}

const char* Embed::admit(Admitted&) {
  if (!rows.read(&args.num_rows)) return "embed: bad row count";
  for (int row = 0; row < args.num_rows; ++row)
    if (args.tokens[row] < 0 || args.tokens[row] >= args.layout.num_tiles * kTileColumns) return "embed: token out of range";
  return nullptr;
}

}  // namespace strop
