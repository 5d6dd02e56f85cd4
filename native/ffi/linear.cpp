#include "ffi/buffers.h"

namespace strop {
namespace {

ffi::Error linear(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> norm, ffi::Buffer<ffi::U8> weights,
                  ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> residual, ffi::Buffer<ffi::S32> counts,
                  ffi::ResultBuffer<ffi::F32> y, int32_t index, int32_t layer, int32_t format, int32_t zero, int32_t num_tiles,
                  int32_t epilogue, int32_t has_norm, int32_t has_bias, float eps, int32_t count_index) {
  const auto in = x.dimensions(), out = y->dimensions();
  if (in.size() != 2 || out.size() != 2 || in[0] != out[0]) return invalid("linear: x and y need shapes [T, K], [T, N]");
  LinearArgs args{};
  args.layout = {WeightFormat(format), zero, int(in[1]), num_tiles};
  args.epilogue = Epilogue(epilogue);
  const int64_t columns = int64_t(num_tiles) * kTileColumns;
  if (out[1] > columns / (args.epilogue == Epilogue::kSwiglu ? 2 : 1)) return invalid("linear: y is wider than W");
  if (!bounded(counts, count_index, in[0], &args.num_rows)) return invalid("linear: bad row count");
  if (!layer_bytes(weights, index, args.layout, &args.weights)) return invalid("linear: W does not match its layout");
  if (has_norm && !(args.norm_weight = layer_floats(norm, layer, in[1]))) return invalid("linear: bad norm shape");
  if (has_bias && !(args.bias = layer_floats(bias, layer, columns))) return invalid("linear: bad bias shape");
  if (args.epilogue == Epilogue::kResidual) {
    if (!same(residual.dimensions(), out)) return invalid("linear: the residual's shape must be y's");
    args.residual = residual.typed_data();
  }
  args.x = x.typed_data();
  args.norm_eps = eps;
  args.y = y->typed_data();
  args.num_columns = int(out[1]);
  kernels().linear(args);
  return ffi::Error::Success();
}

ffi::Error embed(ffi::Buffer<ffi::S32> tokens, ffi::Buffer<ffi::U8> weights, ffi::Buffer<ffi::S32> counts,
                 ffi::ResultBuffer<ffi::F32> y, int32_t format, int32_t zero, int32_t num_tiles) {
  const auto out = y->dimensions();
  if (out.size() != 2 || int64_t(tokens.element_count()) != out[0]) return invalid("embed: y needs shape [T, D]");
  EmbedArgs args{};
  args.layout = {WeightFormat(format), zero, int(out[1]), num_tiles};
  if (!bounded(counts, 0, out[0], &args.num_rows)) return invalid("embed: bad row count");
  if (!layer_bytes(weights, 0, args.layout, &args.weights)) return invalid("embed: W does not match its layout");
  args.tokens = tokens.typed_data();
  for (int row = 0; row < args.num_rows; ++row)
    if (args.tokens[row] < 0 || args.tokens[row] >= num_tiles * kTileColumns) return invalid("embed: token out of range");
  args.y = y->typed_data();
  kernels().embed(args);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace strop

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_linear, strop::linear, xla::ffi::Ffi::Bind()
    .Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::U8>>()
    .Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::F32>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
    .Attr<int32_t>("index").Attr<int32_t>("layer").Attr<int32_t>("format").Attr<int32_t>("zero")
    .Attr<int32_t>("num_tiles").Attr<int32_t>("epilogue").Attr<int32_t>("has_norm").Attr<int32_t>("has_bias").Attr<float>("eps")
    .Attr<int32_t>("count_index"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_embed, strop::embed, xla::ffi::Ffi::Bind()
    .Arg<xla::ffi::Buffer<xla::ffi::S32>>().Arg<xla::ffi::Buffer<xla::ffi::U8>>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
    .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
    .Attr<int32_t>("format").Attr<int32_t>("zero").Attr<int32_t>("num_tiles"));
