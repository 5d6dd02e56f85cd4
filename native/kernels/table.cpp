// The kernels of one ISA as a table; compiled once per ISA beside the kernels themselves.
#include <time.h>

#include "kernels/kernels.h"

#define STROP_STRING_(x) #x
#define STROP_STRING(x) STROP_STRING_(x)

namespace strop::STROP_ISA {

void linear(const LinearArgs&);
void embed(const EmbedArgs&);
void attention(const AttentionArgs&);
void sample_rows(const SampleArgs&, int, int, void*);
void greedy_rows(const float*, int, int32_t*, int, int);

extern const ProbeKernels kProbe;

namespace {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

template <class Args, void (*kKernel)(const Args&)>
void timed(const Args& args) {
  const int64_t start_ns = now_ns();
  kKernel(args);
  kernel_ns.fetch_add(now_ns() - start_ns, std::memory_order_relaxed);
}

}  // namespace

extern const Kernels kTable;
const Kernels kTable = {STROP_STRING(STROP_ISA), timed<LinearArgs, linear>, timed<EmbedArgs, embed>,
                        timed<AttentionArgs, attention>, sample_rows, greedy_rows, kProbe};

}  // namespace strop::STROP_ISA
