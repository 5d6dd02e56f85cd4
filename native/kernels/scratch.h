// Memory a kernel needs while it runs: kept per calling thread until that ends, grown, never shrunk, handed to workers by
// pointer.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace strop {
namespace {  // a copy per translation unit, with slots of its own: no ISA may borrow another's code

struct Scratch {
  void* data = nullptr;
  size_t capacity = 0;

  ~Scratch() { std::free(data); }
  void* at_least(size_t bytes) {
    if (bytes > capacity) {
      std::free(data);
      capacity = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data = std::aligned_alloc(4096, capacity);
      if (data == nullptr) {
        capacity = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
};

template <int kSlot>
inline void* scratch_bytes(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.at_least(bytes);
}

}  // namespace
}  // namespace strop
