#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>

#include "core/errors.h"
#include "cpu/borrowed_threads.h"

namespace fusestep::cpu {
namespace {

std::atomic<int> thread_count{0};
std::atomic<bool> are_chosen{false};

// A positive integer in an environment variable; 0 where it is unset. OMP_NUM_THREADS may be a
// list ("4,2"), of which the first counts.
int threads_from(const char* variable, bool strict) {
  const char* text = std::getenv(variable);
  if (!text || !*text) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  const bool whole = end != text && (*end == '\0' || (!strict && (*end == ',' || *end == ' ')));
  if (whole && value >= 1 && value <= kMaxThreads) return static_cast<int>(value);
  if (!strict) return 0;
  throw ValueError(std::string(variable) + "='" + text + "': expected a whole number from 1 to " +
                   std::to_string(kMaxThreads));
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_threads() {
  if (const int n = threads_from("FUSESTEP_NUM_THREADS", true)) {
    are_chosen.store(true, std::memory_order_relaxed);
    return n;
  }
  if (const int n = threads_from("OMP_NUM_THREADS", false)) return n;
  return std::min(processors(), kMaxThreads);
}

std::atomic<std::uint64_t> forks{0};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // False where the pool is at work for somebody else.
  bool run(std::int64_t chunks, int threads, ChunkFunction function, void* context,
           const Errand& errand) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    grow_to(threads - 1);
    job_ = {function, context, chunks};
    next_.store(0, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    gate_.store(kOpen, std::memory_order_release);
    is_alert_.store(false, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    if (errand) errand();
    work();
    close();
    return true;
  }

  void rouse(int threads) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    grow_to(threads - 1);
    is_alert_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

 private:
  struct Job {
    ChunkFunction function;
    void* context;
    std::int64_t chunks;
  };

  // The gate: its top bit says that a job may be entered, the rest counts who is inside.
  static constexpr std::uint32_t kOpen = 1u << 31;

  void work() {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job_.chunks;)
      job_.function(job_.context, i);
  }

  bool enter() {
    std::uint32_t gate = gate_.load(std::memory_order_relaxed);
    while (gate & kOpen)
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
    return false;
  }

  void leave() {
    if (gate_.fetch_sub(1, std::memory_order_release) == 1) gate_.notify_all();
  }

  // Nobody enters any more; waits for those inside. A thread that never woke up is not waited for.
  void close() {
    std::uint32_t gate = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    for (int spin = 0; gate != 0; gate = gate_.load(std::memory_order_acquire)) {
      if (++spin < 2000)
        relax();
      else
        gate_.wait(gate, std::memory_order_acquire);
    }
  }

  void serve(int helper) {
    for (std::uint32_t seen = 0;;) {
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (!enter()) {
        stay_alert(seen);
        continue;
      }
      if (helper < helpers_.load(std::memory_order_relaxed)) work();
      leave();
    }
  }

  void stay_alert(std::uint32_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kAlertTime;
    while (is_alert_.load(std::memory_order_relaxed) &&
           epoch_.load(std::memory_order_relaxed) == seen) {
      for (int i = 0; i < 16; ++i) relax();
      if (std::chrono::steady_clock::now() > end) return;
    }
  }

  // A machine that gives no more threads is no reason to fail: the work is done by those there are.
  void grow_to(int helpers) {
    if (started_ >= helpers) return;
    sigset_t all, before;  // signals are for the program's own threads: helpers inherit this mask
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started_ < helpers && start_helper()) ++started_;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  bool start_helper() {
    auto start = std::make_unique<Start>(Start{this, started_});
    const auto main = [](void* argument) -> void* {
      const std::unique_ptr<Start> start(static_cast<Start*>(argument));
      start->pool->serve(start->helper);
      return nullptr;
    };
    pthread_t thread;
    if (pthread_create(&thread, nullptr, main, start.get()) != 0) return false;
    start.release();
    pthread_detach(thread);
    return true;
  }

  struct Start {
    Pool* pool;
    int helper;
  };

  std::mutex mutex_;  // held by the one step that uses the pool
  Job job_{};
  int started_ = 0;
  std::atomic<int> helpers_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::uint32_t> gate_{0};
  std::atomic<std::uint32_t> epoch_{0};
  std::atomic<bool> is_alert_{false};  // a job is about to come
};

// Never destroyed: its threads may outlive main(). After fork() the child starts with a new one,
// because the threads of the old one exist in the parent only.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] {
      the_pool.store(new Pool);
      forks.fetch_add(1);
    });
  });
  return *the_pool.load(std::memory_order_acquire);
}

}  // namespace

int num_threads() {
  if (const int borrowed = borrowed::threads()) return borrowed;
  return own_threads();
}

bool threads_are_chosen() {
  own_threads();  // looks at the environment
  return are_chosen.load(std::memory_order_relaxed);
}

int own_threads() {
  int n = thread_count.load(std::memory_order_relaxed);
  if (n == 0) thread_count.store(n = default_threads(), std::memory_order_relaxed);
  return n;
}

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads)
    throw ValueError("num_threads is " + std::to_string(n) + "; expected 1 to " +
                     std::to_string(kMaxThreads));
  thread_count.store(n, std::memory_order_relaxed);
  are_chosen.store(true, std::memory_order_relaxed);
}

std::uint64_t fork_generation() {
  pool();
  return forks.load(std::memory_order_relaxed);
}

void parallel_for(std::int64_t chunks, int threads, ChunkFunction function, void* context,
                  const Errand& errand) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  if (threads > 1 && borrowed::threads() != 0)
    return borrowed::run(chunks, threads, function, context, errand);
  if (threads > 1 && pool().run(chunks, threads, function, context, errand)) return;
  if (errand) errand();
  for (std::int64_t i = 0; i < chunks; ++i) function(context, i);
}

void rouse(int threads) {
  if (threads > 1 && borrowed::threads() == 0) pool().rouse(threads);
}

}  // namespace fusestep::cpu
