// A program: several operations as one call, so that a step pays for one call and not for a hundred. Every operation is
// decoded and checked before the first one runs. src/strop/ops/program.py writes the code:
//   number of temporaries, for each its type, rank, dimensions and place in the scratch memory / 64;
//   number of aliases, for each the operand and the result that must be the same memory;
//   then the operations: kind, number of slots, slots, number of attributes, attributes.
// A slot names an operand of the call, then its results, then the temporaries.
#include <time.h>

#include "ffi/operations.h"
#include "kernels/scratch.h"

namespace strop {
namespace {

enum Kind { kLinear, kEmbed, kAttention, kSample, kGreedy };

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

// The bounded reading of the code's head.
struct Reader {
  ffi::Span<const int32_t> code;
  size_t at = 0;
  bool ok = true;

  int64_t next() {
    if (at >= code.size() || code[at] < 0) {
      ok = false;
      return 0;
    }
    return code[at++];
  }
};

constexpr ffi::DataType kTypes[] = {ffi::F32, ffi::S32, ffi::U32, ffi::BF16, ffi::U8};

// Appends the temporaries, in `memory`; their dimensions lie in `dims`. False when they do not fit.
bool add_temporaries(Reader& reader, uint8_t* memory, int64_t memory_bytes, std::vector<int64_t>& dims,
                     std::vector<Tensor>& tensors) {
  const int64_t num_temporaries = reader.next();
  if (num_temporaries > int64_t(reader.code.size())) return false;
  dims.resize(reader.code.size());  // never moves again: tensors point into it
  size_t num_dims = 0;
  for (int64_t i = 0; i < num_temporaries && reader.ok; ++i) {
    const int64_t type = reader.next(), rank = reader.next();
    if (type >= int64_t(std::size(kTypes)) || rank > int64_t(reader.code.size() - reader.at)) return false;
    const Dims shape(dims.data() + num_dims, size_t(rank));
    int64_t bytes = int64_t(ffi::ByteWidth(kTypes[type]));
    for (int64_t d = 0; d < rank; ++d) {
      const int64_t dim = dims[num_dims++] = reader.next();
      if (dim > 0 && bytes > memory_bytes / dim) return false;
      bytes *= dim;
    }
    const int64_t offset = reader.next() * 64;
    if (offset > memory_bytes - bytes) return false;
    tensors.push_back({memory + offset, kTypes[type], shape});
  }
  return reader.ok;
}

ffi::Error decode(int64_t kind, Operands& operands, const AttentionArgs* last, std::vector<Operation>& operations) {
  Operation& operation = operations.back();
  switch (kind) {
    case kLinear: return decode_linear(operands, &operation.emplace<LinearArgs>());
    case kEmbed: return decode_embed(operands, &operation.emplace<EmbedArgs>());
    case kAttention: return decode_attention(operands, last, &operation.emplace<AttentionArgs>());
    case kSample: return decode_sample(operands, &operation.emplace<SampleRowsArgs>());
    case kGreedy: return decode_greedy(operands, &operation.emplace<GreedyArgs>());
    default: return invalid("program: no such operation");
  }
}

// Tells every linear what the next one reads; the last one, what the first will read in the next step.
void link(std::vector<Operation>& operations) {
  LinearArgs* last = nullptr;
  const LinearArgs* first = nullptr;
  const auto join = [](LinearArgs* before, const LinearArgs* after) {
    before->next_weights = after->weights;
    before->next_bytes = after->layout.tile_bytes() * after->layout.num_tiles;
  };
  for (Operation& operation : operations) {
    auto* linear = std::get_if<LinearArgs>(&operation);
    if (linear == nullptr) continue;
    if (last != nullptr) join(last, linear);
    if (first == nullptr) first = linear;
    last = linear;
  }
  if (last != nullptr && last != first) join(last, first);
}

ffi::Error run_program(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int32_t> code,
                       int64_t scratch_len) {
  thread_local std::vector<Tensor> tensors;
  thread_local std::vector<int64_t> dims;
  thread_local std::vector<Operation> operations;
  tensors.clear();
  operations.clear();
  for (size_t i = 0; i < args.size(); ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    tensors.push_back({buffer->untyped_data(), buffer->element_type(), buffer->dimensions()});
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    tensors.push_back({(*buffer)->untyped_data(), (*buffer)->element_type(), (*buffer)->dimensions()});
  }
  Reader reader{code};
  if (scratch_len < 0) return invalid("program: negative scratch memory");
  auto* memory = static_cast<uint8_t*>(scratch_bytes<0>(size_t(scratch_len)));
  if (!add_temporaries(reader, memory, scratch_len, dims, tensors)) return invalid("program: bad temporaries");
  for (int64_t left = reader.next(); left > 0; --left) {
    const size_t operand = reader.next(), result = args.size() + reader.next();
    if (!reader.ok || operand >= args.size() || result >= args.size() + rets.size()) return invalid("program: bad alias");
    if (tensors[operand].data != tensors[result].data) return invalid("program: the cache must be donated");
  }
  size_t last_attention = 0;
  while (reader.ok && reader.at < code.size()) {
    const int64_t kind = reader.next();
    Operands operands(tensors, code, reader.at);
    operations.emplace_back();
    const auto* last = std::get_if<AttentionArgs>(&operations[last_attention]);
    if (ffi::Error error = decode(kind, operands, last, operations); error.failure()) return error;
    if (kind == kAttention) last_attention = operations.size() - 1;
    reader.at = operands.end();
  }
  if (!reader.ok) return invalid("program: cut short");
  link(operations);
  const int64_t start_ns = now_ns();
  for (const Operation& operation : operations)
    std::visit([](const auto& a) { run(a); }, operation);
  kernel_ns.fetch_add(now_ns() - start_ns, std::memory_order_relaxed);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace strop

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_program, strop::run_program, xla::ffi::Ffi::Bind()
    .RemainingArgs().RemainingRets()
    .Attr<xla::ffi::Span<const int32_t>>("code").Attr<int64_t>("scratch_bytes"));
