// A program: several operations as one call, so that a step pays for one call and not for a hundred. Every operation is
// decoded and checked before the first one runs. src/strop/ops/program.py writes the code:
//   number of temporaries, for each its type, rank, dimensions and place in the scratch memory / 64;
//   number of aliases, for each the operand and the result that must be the same memory;
//   then the operations: kind, number of slots, slots, number of attributes, attributes.
// A slot names an operand of the call, then its results, then the temporaries.
#include <time.h>

#include <cstdio>
#include <memory>

#include "ffi/operations.h"
#include "kernels/scratch.h"

namespace strop {
namespace {

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

ffi::Error decode(int64_t kind, Operands& operands, Operation& operation) {
  switch (kind) {
    case 0: return operation.emplace<Linear>().decode(operands);
    case 1: return operation.emplace<Embed>().decode(operands);
    case 2: return operation.emplace<Attention>().decode(operands);
    case 3: return operation.emplace<Sample>().decode(operands);
    case 4: return operation.emplace<Greedy>().decode(operands);
    case 5: return operation.emplace<AddNorm>().decode(operands);
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
    auto* call = std::get_if<Linear>(&operation);
    if (call == nullptr) continue;
    LinearArgs* linear = &call->args;
    if (last != nullptr) join(last, linear);
    if (first == nullptr) first = linear;
    last = linear;
  }
  if (last != nullptr && last != first) join(last, first);
}

// Fills `operations`; `tensors` hold operands and results and get the temporaries, with their dimensions in `dims`.
ffi::Error decode(std::vector<Tensor>& tensors, size_t num_operands, ffi::Span<const int32_t> code, int64_t scratch_len,
                  std::vector<int64_t>& dims, std::vector<Operation>& operations) {
  operations.clear();
  const size_t num_given = tensors.size();
  Reader reader{code};
  if (scratch_len < 0) return invalid("program: negative scratch memory");
  auto* memory = static_cast<uint8_t*>(scratch_bytes<0>(size_t(scratch_len)));
  if (!add_temporaries(reader, memory, scratch_len, dims, tensors)) return invalid("program: bad temporaries");
  for (int64_t left = reader.next(); left > 0; --left) {
    const size_t operand = reader.next(), result = num_operands + reader.next();
    if (!reader.ok || operand >= num_operands || result >= num_given) return invalid("program: bad alias");
    if (tensors[operand].data != tensors[result].data) return invalid("program: the cache must be donated");
  }
  while (reader.ok && reader.at < code.size()) {
    const int64_t kind = reader.next();
    Operands operands(tensors, num_operands, code, reader.at);
    if (ffi::Error error = decode(kind, operands, operations.emplace_back()); error.failure()) return error;
    reader.at = operands.end();
  }
  if (!reader.ok) return invalid("program: cut short");
  link(operations);
  return ffi::Error::Success();
}

// Null, or why nothing was run.
const char* run(std::vector<Operation>& operations) {
  Admitted admitted;
  for (Operation& operation : operations)
    if (const char* wrong = std::visit([&](auto& o) { return o.admit(admitted); }, operation)) return wrong;
  const int64_t start_ns = now_ns();
  for (const Operation& operation : operations)
    std::visit([](const auto& o) { o.run(); }, operation);
  kernel_ns.fetch_add(now_ns() - start_ns, std::memory_order_relaxed);
  return nullptr;
}

ffi::Error called_by_xla(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int32_t> code,
                         int64_t scratch_len) {
  thread_local std::vector<Tensor> tensors;
  tensors.clear();
  for (size_t i = 0; i < args.size(); ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    tensors.push_back({buffer->untyped_data(), buffer->element_type(), buffer->dimensions()});
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    tensors.push_back({(*buffer)->untyped_data(), (*buffer)->element_type(), (*buffer)->dimensions()});
  }
  thread_local std::vector<int64_t> dims;
  thread_local std::vector<Operation> operations;
  if (ffi::Error error = decode(tensors, args.size(), code, scratch_len, dims, operations); error.failure()) return error;
  const char* wrong = run(operations);
  return wrong != nullptr ? invalid(wrong) : ffi::Error::Success();
}

// A program with the shapes of its operands and results; decoded again only when an address has changed.
struct Bound {
  std::vector<int32_t> code;
  std::vector<int64_t> dims, temporary_dims;
  std::vector<Tensor> tensors;
  std::vector<void*> addresses;
  std::vector<Operation> operations;
  size_t num_operands;
  int64_t scratch_len;
  const void* scratch = nullptr;  // where the temporaries were when it was decoded
  bool decoded = false;
};

}  // namespace
}  // namespace strop

XLA_FFI_DEFINE_HANDLER_SYMBOL(strop_program, strop::called_by_xla, xla::ffi::Ffi::Bind()
    .RemainingArgs().RemainingRets()
    .Attr<xla::ffi::Span<const int32_t>>("code").Attr<int64_t>("scratch_bytes"));

extern "C" {

// A program to call without XLA. `types` (as kTypes numbers them) and `ranks` of num_operands + num_results tensors,
// their dimensions one after the other. Null: no such type.
void* strop_bind(int32_t num_operands, int32_t num_results, const int32_t* types, const int32_t* ranks,
                 const int64_t* dims, const int32_t* code, int64_t code_len, int64_t scratch_len) {
  using namespace strop;
  auto bound = std::make_unique<Bound>();
  const int num_tensors = num_operands + num_results;
  size_t num_dims = 0;
  for (int i = 0; i < num_tensors; ++i) num_dims += ranks[i];
  bound->code.assign(code, code + code_len);
  bound->dims.assign(dims, dims + num_dims);
  bound->num_operands = num_operands;
  bound->scratch_len = scratch_len;
  const int64_t* next = bound->dims.data();
  for (int i = 0; i < num_tensors; next += ranks[i++]) {
    if (types[i] < 0 || types[i] >= int32_t(std::size(kTypes))) return nullptr;
    bound->tensors.push_back({nullptr, kTypes[types[i]], Dims(next, size_t(ranks[i]))});
  }
  bound->addresses.resize(bound->tensors.size());
  return bound.release();
}

// Runs it on these addresses; 0, or 1 with what was wrong in `message`.
int32_t strop_run_bound(void* handle, void* const* addresses, char* message, int64_t message_len) {
  using namespace strop;
  auto& bound = *static_cast<Bound*>(handle);
  const auto fail = [&](const char* what) {
    std::snprintf(message, size_t(message_len), "%s", what);
    return 1;
  };
  try {
    const void* scratch = scratch_bytes<0>(size_t(bound.scratch_len));
    const size_t num_given = bound.addresses.size();
    if (!bound.decoded || bound.scratch != scratch ||
        !std::equal(bound.addresses.begin(), bound.addresses.end(), addresses)) {
      bound.decoded = false;
      bound.tensors.resize(num_given);  // without the temporaries of last time
      for (size_t i = 0; i < num_given; ++i) bound.tensors[i].data = bound.addresses[i] = addresses[i];
      const ffi::Span<const int32_t> code(bound.code.data(), bound.code.size());
      const ffi::Error error = decode(bound.tensors, bound.num_operands, code, bound.scratch_len, bound.temporary_dims,
                                      bound.operations);
      if (error.failure()) return fail(error.message().c_str());
      bound.scratch = scratch;
      bound.decoded = true;
    }
    const char* wrong = run(bound.operations);
    return wrong != nullptr ? fail(wrong) : 0;
  } catch (const std::bad_alloc&) {
    return fail("strop: no memory for a step's intermediate values");
  }
}

void strop_unbind(void* handle) { delete static_cast<strop::Bound*>(handle); }
}
