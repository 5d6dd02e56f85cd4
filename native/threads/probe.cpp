// The probes as Python calls them: the pool's threads, the ISA in use, the best of many short runs.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/kernels.h"
#include "threads/pool.h"

namespace strop {
namespace {

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The best of `run()`'s rates (work done, divided by the seconds it took) within `seconds`, of at least three.
template <class Run>
double best_rate(double seconds, const Run& run) {
  double best = 0;
  const double end = now_s() + seconds;
  for (int i = 0; i < 3 || now_s() < end; ++i) {
    const double start = now_s();
    const double work = run();
    best = std::max(best, work / (now_s() - start));
  }
  return best;
}

constexpr int64_t kChunkBytes = 256 << 10;
constexpr int kChunksPerThread = 16;

}  // namespace

std::atomic<int64_t> kernel_ns{0};

}  // namespace strop

extern "C" {

int64_t strop_kernel_ns() { return strop::kernel_ns.load(std::memory_order_relaxed); }

// Multiplications and additions per second of one kind (kernels/probe.h) by all threads; 0 when there are no kernels.
double strop_probe_rate(int32_t kind, double seconds) {
  const strop::Kernels* table = strop::kernels_or_null();
  if (table == nullptr || kind < 0 || kind > 2) return 0;
  strop::Pool& pool = strop::Pool::instance();
  constexpr int64_t kRounds = 2000;  // tens of microseconds: a thread that lost its core delays a run little
  const int64_t per_chunk = table->probe.products(strop::ProductKind(kind), kRounds);
  return strop::best_rate(seconds, [&] {
    const int num_chunks = pool.num_threads() * strop::kChunksPerThread;
    pool.run(num_chunks, [&](int) { table->probe.products(strop::ProductKind(kind), kRounds); });
    return double(num_chunks) * double(per_chunk);
  });
}

// Bytes per second at which all threads read `num_bytes` over and over; 0 when the memory cannot be had.
double strop_probe_bandwidth(int64_t num_bytes, double seconds, int32_t huge_pages) {
  const strop::Kernels* table = strop::kernels_or_null();
  if (table == nullptr || num_bytes <= 0) return 0;
  void* memory = mmap(nullptr, size_t(num_bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size_t(num_bytes), huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  std::memset(memory, 1, size_t(num_bytes));
  const auto* data = static_cast<const uint8_t*>(memory);
  const int64_t num_chunks = (num_bytes + strop::kChunkBytes - 1) / strop::kChunkBytes;
  std::atomic<uint64_t> total{0};
  const double best = strop::best_rate(seconds, [&] {
    // The pool counts chunks in 16 bits: sweep larger sets in several calls.
    for (int64_t first = 0; first < num_chunks; first += 0xffff) {
      const int64_t count = std::min<int64_t>(num_chunks - first, 0xffff);
      strop::Pool::instance().run(int(count), [&](int chunk) {
        const int64_t begin = (first + chunk) * strop::kChunkBytes;
        total.fetch_add(table->probe.read(data + begin, std::min(strop::kChunkBytes, num_bytes - begin)),
                        std::memory_order_relaxed);
      });
    }
    return double(num_bytes);
  });
  munmap(memory, size_t(num_bytes));
  return best;
}
}
