// The probes as Python calls them: threads of their own, since a probe wants each thread's full speed and none of the
// pool's caution; the best of many short windows, so that another process on the machine does not lower the limit.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/kernels.h"

namespace strop {
namespace {

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Calls work(thread) on every thread, the caller's included.
template <class Work>
void on_threads(int num_threads, const Work& work) {
  std::vector<std::thread> threads;
  for (int index = 1; index < num_threads; ++index) threads.emplace_back([&work, index] { work(index); });
  work(0);
  for (std::thread& thread : threads) thread.join();
}

// For work in registers, which no other thread can slow down: every thread's best rate in calls of body() per second
// over any `calls_per_window` of its own, summed over the threads.
template <class Body>
double sum_of_best_rates(int num_threads, double seconds, int calls_per_window, const Body& body) {
  std::vector<double> best(num_threads, 0.0);
  const double end = now_s() + seconds;
  on_threads(num_threads, [&](int index) {
    for (double before = now_s(); before < end;) {
      for (int call = 0; call < calls_per_window; ++call) body();
      const double after = now_s();
      best[index] = std::max(best[index], calls_per_window / (after - before));
      before = after;
    }
  });
  double total = 0;
  for (const double rate : best) total += rate;
  return total;
}

// For work that shares the memory. Threads claim chunks, body(chunk number), until `seconds` have passed. The result is the best rate in chunks per
// second over any window of `chunks_per_window` claims. A window lasts from before its first claim to after the next
// one's, so a thread that loses its core in between can only lengthen it.
template <class Body>
double best_rate(int num_threads, double seconds, int64_t chunks_per_window, const Body& body) {
  struct Stamp {
    int64_t window;
    double before, after;
  };
  std::atomic<int64_t> next{0};
  std::vector<std::vector<Stamp>> stamps(num_threads);
  const double end = now_s() + seconds;
  on_threads(num_threads, [&](int index) {
    for (double before = now_s(); before < end; before = now_s()) {
      const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
      if (chunk % chunks_per_window == 0) stamps[index].push_back({chunk / chunks_per_window, before, now_s()});
      body(chunk);
    }
  });
  std::vector<Stamp> all;
  for (const auto& some : stamps) all.insert(all.end(), some.begin(), some.end());
  std::sort(all.begin(), all.end(), [](const Stamp& a, const Stamp& b) { return a.window < b.window; });
  double best = 0;
  for (size_t i = 2; i < all.size(); ++i)  // the first window warms up
    best = std::max(best, double(chunks_per_window) / (all[i].after - all[i - 1].before));
  return best;
}

}  // namespace

std::atomic<int64_t> kernel_ns{0};

}  // namespace strop

extern "C" {

int64_t strop_kernel_ns() { return strop::kernel_ns.load(std::memory_order_relaxed); }

// Multiplications and additions per second of one kind (kernels/probe.h) by all threads. 0: no kernels run here.
double strop_probe_rate(int32_t kind, int32_t num_threads, double seconds) {
  const strop::Kernels* table = strop::kernels_or_null();
  if (table == nullptr || kind < 0 || kind > 2 || num_threads < 1) return 0;
  constexpr int64_t kRounds = 400;  // about ten microseconds
  const int64_t operations = table->probe.products(strop::ProductKind(kind), kRounds);
  const auto body = [&] { table->probe.products(strop::ProductKind(kind), kRounds); };
  return double(operations) * strop::sum_of_best_rates(num_threads, seconds, 30, body);
}

// Bytes per second at which all threads together read `num_bytes`, over and over. 0: no kernels, or no such memory.
double strop_probe_bandwidth(int64_t num_bytes, int32_t num_threads, double seconds, int32_t huge_pages) {
  const strop::Kernels* table = strop::kernels_or_null();
  constexpr int64_t kChunkBytes = 128 << 10;
  const int64_t num_chunks = (num_bytes + kChunkBytes - 1) / kChunkBytes, padded = num_chunks * kChunkBytes;
  if (table == nullptr || num_bytes < 1 || num_threads < 1) return 0;
  void* memory = mmap(nullptr, size_t(padded), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size_t(padded), huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  std::memset(memory, 1, size_t(padded));
  const auto* data = static_cast<const uint8_t*>(memory);
  const int64_t sweeps = std::max<int64_t>(1, int64_t(num_threads) * 64 / num_chunks);
  const auto body = [&](int64_t chunk) {
    const uint64_t sum = table->probe.read(data + chunk % num_chunks * kChunkBytes, kChunkBytes);
    asm volatile("" : : "r"(sum));
  };
  const double chunks_per_s = strop::best_rate(num_threads, seconds, num_chunks * sweeps, body);
  munmap(memory, size_t(padded));
  return chunks_per_s * double(kChunkBytes);
}
}
