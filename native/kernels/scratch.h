// Memory a kernel needs while it runs: kept per calling thread, grown, never shrunk, handed to workers by pointer.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace strop {
namespace {  // a copy per translation unit: no ISA may borrow another's code

template <int kSlot>
inline void* scratch_bytes(size_t bytes) {
  thread_local void* data = nullptr;
  thread_local size_t capacity = 0;
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

}  // namespace
}  // namespace strop
