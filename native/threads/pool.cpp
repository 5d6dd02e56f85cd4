#include "threads/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <climits>
#include <thread>

namespace strop {
namespace {

constexpr int kSpins = 4000;                     // pauses before a worker sleeps: some tens of microseconds
constexpr int64_t kStarvedNs = 300'000;          // after waiting this long, see whether the worker has been running
constexpr int64_t kAloneMinNs = 5'000'000;       // work alone this long after that, doubling up to the maximum
constexpr int64_t kAloneMaxNs = 160'000'000;
constexpr int kMaxWorkers = 255;
constexpr size_t kMaxAheadBytes = 256 << 10;      // what a waiting thread fetches at most

int64_t read_ns(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

int64_t now_ns() { return read_ns(CLOCK_MONOTONIC); }

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

// A thread's range of the running job. The job's number, the range's end and its next chunk are one word, so that a late
// thread can never take a chunk of a job it was not called for.
struct alignas(64) Range {
  std::atomic<uint64_t> claim{0};
};

struct Claim {
  uint32_t ticket;
  uint16_t end, next;

  explicit Claim(uint64_t word) : ticket(uint32_t(word >> 32)), end(uint16_t(word >> 16)), next(uint16_t(word)) {}
  Claim(uint32_t ticket, int end, int next) : ticket(ticket), end(uint16_t(end)), next(uint16_t(next)) {}
  uint64_t word() const { return uint64_t(ticket) << 32 | uint64_t(end) << 16 | next; }
};

// A worker's processor clock tells a thread that computes (or faults pages in) from one that lost its core.
struct alignas(64) Worker {
  std::atomic<bool> working{false};
  clockid_t clock = 0;  // set before `working` is first true
};

// What a thread will read in the next job, as far as it is known: fetched while it waits.
class Pool::Ahead {
 public:
  // Thread `index`'s share of what comes next, unless it has been begun already.
  void begin(const Shared& shared, int index, int num_threads);
  // Fetches a line; false when there is none left.
  bool fetch() {
    if (at_ >= end_) return false;
#if defined(__x86_64__)
    _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T1);
#endif
    at_ += 64;
    return true;
  }

 private:
  const uint8_t* next_ = nullptr;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
};

struct Pool::Shared {
  Range ranges[kMaxWorkers + 1];  // of the caller, then of the workers
  alignas(64) std::atomic<uint32_t> job{0};
  std::atomic<int> num_asleep{0};
  alignas(64) std::atomic<int> num_left{0};  // chunks not done yet
  std::atomic<bool> busy{false};
  Call call = nullptr;
  const void* body = nullptr;
  std::atomic<const uint8_t*> next{nullptr};
  std::atomic<size_t> next_bytes{0};
  Ahead ahead;  // the caller's
  Worker workers[kMaxWorkers];

  int64_t worked_ns(int worker) const {
    return workers[worker].working.load(std::memory_order_acquire) ? read_ns(workers[worker].clock) : -1;
  }
};

void Pool::Ahead::begin(const Shared& shared, int index, int num_threads) {
  const uint8_t* next = shared.next.load(std::memory_order_relaxed);
  if (next == next_) return;
  next_ = next;
  const size_t bytes = shared.next_bytes.load(std::memory_order_relaxed), share = bytes / num_threads;
  at_ = next + bytes / 64 * index / num_threads * 64;
  end_ = next == nullptr ? at_ : at_ + std::min(share, kMaxAheadBytes);
}

void Pool::expect(const void* next, size_t num_bytes) {
  shared_->next_bytes.store(num_bytes, std::memory_order_relaxed);
  shared_->next.store(static_cast<const uint8_t*>(next), std::memory_order_relaxed);
}

Pool& Pool::instance() {
  static Pool* pool = new Pool;  // leaked: sleeping workers must not be joined at exit
  return *pool;
}

Pool::Pool() : shared_(new Shared) {}

void Pool::resize(int num_threads) {
  num_threads = std::clamp(num_threads, 1, kMaxWorkers + 1);
  bool idle = false;
  while (!shared_->busy.compare_exchange_weak(idle, true, std::memory_order_acquire)) {
    idle = false;
    usleep(50);
  }
  for (; num_workers_ < num_threads - 1; ++num_workers_) std::thread(worker_main, this, num_workers_).detach();
  num_threads_ = num_threads;
  shared_->busy.store(false, std::memory_order_release);
}

void Pool::work(uint32_t ticket, int index) noexcept {
  Shared& s = *shared_;
  const int num_threads = this->num_threads();
  for (int turn = 0; turn < num_threads; ++turn) {
    std::atomic<uint64_t>& claim = s.ranges[(index + turn) % num_threads].claim;
    int num_done = 0;
    uint64_t seen = claim.load(std::memory_order_acquire);
    for (Claim c(seen); c.ticket == ticket && c.next < c.end; c = Claim(seen)) {
      if (!claim.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      s.call(s.body, c.next);
      ++num_done;
      seen = claim.load(std::memory_order_acquire);
    }
    if (num_done > 0 && s.num_left.fetch_sub(num_done, std::memory_order_release) == num_done) return;  // all done
  }
}

void Pool::worker_main(Pool* pool, int index) {
  Shared& s = *pool->shared_;
  Worker& self = s.workers[index];
  pthread_getcpuclockid(pthread_self(), &self.clock);
  uint32_t last = 0;
  Ahead ahead;
  for (;;) {
    uint32_t job = s.job.load(std::memory_order_acquire);
    for (int spin = 0; job == last && spin < kSpins; ++spin) {
      if (!ahead.fetch()) relax();
      job = s.job.load(std::memory_order_acquire);
    }
    if (job == last) {
      s.num_asleep.fetch_add(1);
      futex_wait(&s.job, last);
      s.num_asleep.fetch_sub(1);
      continue;
    }
    last = job;
    if (index >= pool->num_threads() - 1) continue;
    self.working.store(true, std::memory_order_release);
    pool->work(job, index + 1);
    ahead.begin(s, index + 1, pool->num_threads());
    self.working.store(false, std::memory_order_release);
  }
}

bool Pool::wait() {
  Shared& s = *shared_;
  int64_t start_ns = 0, worked_ns[kMaxWorkers];
  s.ahead.begin(s, 0, num_threads());
  for (int spin = 1; s.num_left.load(std::memory_order_acquire) != 0; ++spin) {
    if (!s.ahead.fetch()) relax();
    if (spin % 256 != 0) continue;
    if (start_ns == 0) {
      start_ns = now_ns();
      for (int i = 0; i < num_workers_; ++i) worked_ns[i] = s.worked_ns(i);
    } else if (now_ns() - start_ns > kStarvedNs) {
      usleep(50);  // give the core away: the worker may be waiting for it
    }
  }
  if (start_ns == 0) return true;
  const int64_t waited_ns = now_ns() - start_ns;
  if (waited_ns < kStarvedNs) return true;
  for (int i = 0; i < num_workers_; ++i)
    if (worked_ns[i] >= 0 && read_ns(s.workers[i].clock) - worked_ns[i] < waited_ns / 2) return false;
  return true;
}

void Pool::run_erased(int num_chunks, Call call, const void* body) {
  Shared& s = *shared_;
  bool idle = false;
  const bool alone = num_threads() == 1 || num_chunks <= 1 || num_chunks > kMaxChunks ||
                     (alone_ns_ != 0 && now_ns() < alone_until_ns_);
  if (alone || !s.busy.compare_exchange_strong(idle, true, std::memory_order_acquire)) {
    for (int chunk = 0; chunk < num_chunks; ++chunk) call(body, chunk);
    return;
  }
  s.call = call;
  s.body = body;
  s.num_left.store(num_chunks, std::memory_order_relaxed);
  const uint32_t ticket = s.job.load(std::memory_order_relaxed) + 1;
  for (int i = 0; i < num_threads(); ++i) {
    const Claim range(ticket, range_begin(num_chunks, i + 1), range_begin(num_chunks, i));
    s.ranges[i].claim.store(range.word(), std::memory_order_release);
  }
  s.job.store(ticket, std::memory_order_seq_cst);
  if (s.num_asleep.load(std::memory_order_seq_cst) > 0) futex_wake(&s.job);
  work(ticket, 0);
  if (!wait()) {
    ++num_starved_;
    alone_ns_ = alone_ns_ == 0 ? kAloneMinNs : std::min(alone_ns_ * 2, kAloneMaxNs);
    alone_until_ns_ = now_ns() + alone_ns_;
  } else if (alone_ns_ != 0 && now_ns() > alone_until_ns_ + alone_ns_) {
    alone_ns_ = 0;  // a quiet stretch as long as the last ban: trust the core again
  }
  s.busy.store(false, std::memory_order_release);
}

}  // namespace strop
