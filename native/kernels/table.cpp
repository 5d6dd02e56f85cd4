// The kernels of one ISA as a table; compiled once per ISA beside the kernels themselves.
#include "kernels/kernels.h"

#define STROP_STRING_(x) #x
#define STROP_STRING(x) STROP_STRING_(x)

namespace strop::STROP_ISA {

void linear(const LinearArgs&);
void embed(const EmbedArgs&);
void attention(const AttentionArgs&);
void add_norm(const AddNormArgs&);
void sample_rows(const SampleArgs&, int, int, void*);
void greedy_rows(const float*, int, int32_t*, int, int);

extern const ProbeKernels kProbe;

extern const Kernels kTable;
const Kernels kTable = {STROP_STRING(STROP_ISA), linear, embed, attention, add_norm, sample_rows, greedy_rows, kProbe};

}  // namespace strop::STROP_ISA
