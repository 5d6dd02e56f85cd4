#include "ffi/operations.h"

namespace strop {

// x, counts, [residual], [norm], y.
ffi::Error AddNorm::decode(Operands& operands) {
  const auto x = operands.next<ffi::F32>();
  const auto counts = operands.next<ffi::S32>();
  const bool has_residual = operands.attr();
  args.scale = operands.float_attr();
  const auto residual = has_residual ? operands.next<ffi::F32>() : View<ffi::F32>{};
  if (!take_norm(operands, &args.norm)) return invalid("norm: bad norm");
  const auto y = operands.result<ffi::F32>();
  if (!operands.all_taken()) return invalid("norm: operands of other number or type than expected");
  if (x.dims.size() != 2 || !same(x.dims, y.dims) || (has_residual && !same(residual.dims, x.dims)))
    return invalid("norm: x, the residual and y need one shape [T, D]");
  if (args.norm.weight != nullptr && args.norm.len != x.dims[1]) return invalid("norm: the norm's length must be D");
  if (!rows.bind(counts, 0, x.dims[0])) return invalid("norm: no such row count");
  args.x = x.data, args.residual = residual.data, args.y = y.data, args.len = int(x.dims[1]);
  return ffi::Error::Success();
}

const char* AddNorm::admit(Admitted&) { return rows.read(&args.num_rows) ? nullptr : "norm: bad row count"; }

}  // namespace strop
