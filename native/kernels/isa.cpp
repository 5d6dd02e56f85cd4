// Picks the widest ISA this machine runs, or the one STROP_ISA forces (so that tests cover all of them).
#include <cpuid.h>

#include <cstdlib>
#include <cstring>

#include "kernels/kernels.h"

namespace strop {

namespace avx2 { extern const Kernels kTable; }
namespace avx512_vnni { extern const Kernels kTable; }
namespace avx512_bf16 { extern const Kernels kTable; }

namespace {

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool runs_avx512_vnni() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool runs_avx512_bf16() { return runs_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

struct Candidate {
  const Kernels* table;
  bool (*runs)();
};
const Candidate kCandidates[] = {
    {&avx512_bf16::kTable, runs_avx512_bf16}, {&avx512_vnni::kTable, runs_avx512_vnni}, {&avx2::kTable, runs_avx2}};

const Kernels* pick() {
  __builtin_cpu_init();
  const char* forced = std::getenv("STROP_ISA");
  for (const Candidate& c : kCandidates)
    if (c.runs() && (forced == nullptr || *forced == 0 || std::strcmp(forced, c.table->isa) == 0)) return c.table;
  return nullptr;
}

}  // namespace

const Kernels* kernels_or_null() {
  static const Kernels* table = pick();
  return table;
}

const Kernels& kernels() { return *kernels_or_null(); }

}  // namespace strop

extern "C" {

// The name of the ISA in use, or an empty string when this machine (or STROP_ISA) leaves none.
const char* strop_isa() {
  const strop::Kernels* table = strop::kernels_or_null();
  return table == nullptr ? "" : table->isa;
}
}
