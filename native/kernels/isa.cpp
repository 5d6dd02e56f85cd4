// Picks the widest ISA this machine runs, or the one STROP_ISA forces (so that tests cover all of them).
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "kernels/kernels.h"

namespace strop {

namespace avx2 { extern const Kernels kTable; }
namespace avx512_vnni { extern const Kernels kTable; }
namespace avx512_bf16 { extern const Kernels kTable; }
namespace amx { extern const Kernels kTable; }
namespace amx_emulated { extern const Kernels kTable; }  // for tests: only when asked for by name

namespace {

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool runs_avx512_vnni() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool runs_avx512_bf16() { return runs_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// AMX needs the kernel's leave for its tile registers, once per process.
bool runs_amx() {
  if (!runs_avx512_bf16()) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Candidate {
  const Kernels* table;
  bool (*runs)();
};
const Candidate kCandidates[] = {
    {&amx::kTable, runs_amx},
    {&avx512_bf16::kTable, runs_avx512_bf16}, {&avx512_vnni::kTable, runs_avx512_vnni}, {&avx2::kTable, runs_avx2}};
const Candidate kEmulated = {&amx_emulated::kTable, runs_avx2};

// The best this machine runs, or the one called `name`; null if there is none.
const Kernels* find(const char* name) {
  __builtin_cpu_init();
  for (const Candidate& c : kCandidates)
    if ((name == nullptr || *name == 0 || std::strcmp(name, c.table->isa) == 0) && c.runs()) return c.table;
  if (name != nullptr && std::strcmp(name, kEmulated.table->isa) == 0 && kEmulated.runs()) return kEmulated.table;
  return nullptr;
}

const Kernels*& selected() {
  static const Kernels* table = find(std::getenv("STROP_ISA"));
  return table;
}

}  // namespace

const Kernels* kernels_or_null() { return selected(); }

const Kernels& kernels() { return *kernels_or_null(); }

}  // namespace strop

extern "C" {

// The name of the ISA in use, or an empty string when this machine (or STROP_ISA) leaves none.
const char* strop_isa() {
  const strop::Kernels* table = strop::kernels_or_null();
  return table == nullptr ? "" : table->isa;
}

// Switches to the ISA called `name`, between steps only; 0 when this machine does not run it.
int strop_select_isa(const char* name) {
  const strop::Kernels* table = strop::find(name);
  if (table != nullptr) strop::selected() = table;
  return table != nullptr;
}
}
