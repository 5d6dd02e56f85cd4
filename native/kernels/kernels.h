// One table of functions per ISA; the first call picks the best this machine runs (see isa.cpp).
#pragma once

#include "kernels/attention.h"
#include "kernels/linear.h"

namespace strop {

struct Kernels {
  const char* isa;
  void (*linear)(const LinearArgs&);
  void (*embed)(const EmbedArgs&);
  void (*attention)(const AttentionArgs&);
};

const Kernels* kernels_or_null();  // null: none of them runs here
const Kernels& kernels();

}  // namespace strop
