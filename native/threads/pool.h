// A fork-join pool for steps of a few microseconds.
//
// Every thread owns a contiguous range of the chunks, so that what it reads is one stream, and then takes over what
// others have not claimed: a worker that lost its core costs at most the one chunk it holds. The caller works too.
// Workers spin briefly, then sleep on a futex. When the caller catches itself waiting for a chunk far
// longer than its own chunks took, it takes the worker's core for lost and works alone for a while.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace strop {

class Pool {
 public:
  // Threads that compute, the caller included. `resize` waits for a running job.
  static Pool& instance();
  void resize(int num_threads);
  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  static constexpr int kMaxChunks = 0xffff;  // of a job that is shared; a longer one runs on the caller alone

  // Calls body(chunk) for every chunk in [0, num_chunks), in any order, on any thread; returns when all are done. A body
  // that throws ends the process: other threads may still be running it.
  // Falls back to a plain loop when another thread is running a job or only one thread is wanted.
  template <class Body>
  void run(int num_chunks, const Body& body) {
    run_erased(num_chunks, [](const void* b, int chunk) { (*static_cast<const Body*>(b))(chunk); }, &body);
  }

  // What the coming jobs will read, in order, each thread its share: a thread that waits fetches it.
  void expect(const void* next, size_t num_bytes);

  // Thread `index` owns the chunks from here to where the next thread's begin.
  int range_begin(int num_chunks, int index) const { return int(int64_t(num_chunks) * index / num_threads()); }
  // The last thread whose range begins at or before `chunk`.
  int owner_of(int num_chunks, int chunk) const { return int((int64_t(chunk + 1) * num_threads() - 1) / num_chunks); }

  int64_t num_starved() const { return num_starved_; }

 private:
  using Call = void (*)(const void*, int);
  class Ahead;
  struct Shared;
  Pool();
  void run_erased(int num_chunks, Call call, const void* body);
  void work(uint32_t ticket, int index) noexcept;
  bool wait();  // false: a worker sat on its chunk without running
  static void worker_main(Pool* pool, int index);

  std::atomic<int> num_threads_{1};
  int num_workers_ = 0;
  int64_t num_starved_ = 0;
  int64_t alone_until_ns_ = 0;
  int64_t alone_ns_ = 0;
  Shared* shared_;
};

}  // namespace strop
