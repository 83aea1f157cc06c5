// The limit of a step: a loop that reads and writes exactly the bytes the optimizer has to, and
// computes next to nothing. No optimizer that keeps its state in memory can be faster.
//
// Each thread gets one half (third, ...) of the arrays, once and for all: the plainest division
// there is. The threads are kept between calls and wait for the next one as OpenMP's do, spinning
// for a while before they sleep: a sleeping thread needs some ten microseconds to wake up, and now
// and then wakes up on the processor of the one that woke it.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

// Adam: reads p, g, m, v and writes p, m, v: 28 bytes an element with state of float, 20 with state
// of 16 bits, 16 with state of 8 bits.
template <class State>
void adam(std::int64_t begin, std::int64_t end, float c, float* __restrict p,
          const float* __restrict g, State* __restrict m, State* __restrict v) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float x = g[i] * c;
    p[i] += x;
    if constexpr (std::is_same_v<State, float>) {
      m[i] += x;
      v[i] += x;
    } else {
      m[i] = static_cast<State>(m[i] + 1);
      v[i] = static_cast<State>(v[i] + 1);
    }
  }
}

// Adam, the average a of the parameter, and the gradient cleared: reads and writes p, g, m, v, a:
// 40 bytes an element.
void whole_step(std::int64_t begin, std::int64_t end, float c, float* __restrict p,
                float* __restrict g, float* __restrict m, float* __restrict v,
                float* __restrict a) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float x = g[i] * c;
    p[i] += x;
    m[i] += x;
    v[i] += x;
    a[i] += x;
    g[i] = 0;
  }
}

// NAG and Adagrad: reads p, g, s and writes p, s: 20 bytes an element.
void one_state(std::int64_t begin, std::int64_t end, float c, float* __restrict p,
               const float* __restrict g, float* __restrict s) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float x = g[i] * c;
    p[i] += x;
    s[i] += x;
  }
}

// Reads, and does with it what cannot be left out: as many sums as vectors want at a time.
void read(std::int64_t begin, std::int64_t end, const float* __restrict p, float* __restrict sum) {
  constexpr std::int64_t lanes = 256;
  float lane[lanes] = {};
  for (std::int64_t i = begin; i + lanes <= end; i += lanes)
    for (std::int64_t j = 0; j < lanes; ++j) lane[j] += p[i + j];
  for (const float x : lane) *sum += x;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` is no longer `old`: a moment awake, then asleep. Awake, it yields: where both
// threads find themselves on one processor, neither may keep the other from its work for a whole
// time slice.
template <class T>
void wait(const std::atomic<T>& value, T old) {
  using Clock = std::chrono::steady_clock;
  constexpr auto awake = std::chrono::milliseconds(2);
  for (const auto begin = Clock::now(); Clock::now() - begin < awake; std::this_thread::yield())
    for (int i = 0; i < 64; ++i, relax())
      if (value.load() != old) return;
  value.wait(old);
}

class Pool {
 public:
  using Part = std::function<void(int)>;

  // Calls part(0), ..., part(parts - 1) at the same time; part(0) here.
  void run(int parts, const Part& part) {
    if (parts == 1) return part(0);
    while (static_cast<int>(threads_.size()) < parts - 1)
      threads_.emplace_back([this, i = static_cast<int>(threads_.size()) + 1] { serve(i); });
    part_ = &part;
    parts_ = parts;
    left_.store(static_cast<int>(threads_.size()));
    epoch_.fetch_add(1);
    epoch_.notify_all();
    part(0);
    for (int left; (left = left_.load()) != 0;) wait(left_, left);
  }

  ~Pool() {
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void serve(int i) {
    for (unsigned seen = 0;;) {
      wait(epoch_, seen);
      seen = epoch_.load();
      if (stop_) return;
      if (i < parts_) (*part_)(i);
      if (left_.fetch_sub(1) == 1) left_.notify_all();
    }
  }

  std::vector<std::thread> threads_;
  const Part* part_ = nullptr;
  int parts_ = 0;
  std::atomic<bool> stop_{false};
  std::atomic<int> left_{0};
  std::atomic<unsigned> epoch_{0};
};

Pool pool;

// Calls loop(begin, end) for each thread's share, which starts at a cache line.
template <class Loop>
void share(std::int64_t size, int threads, Loop loop) {
  constexpr std::int64_t line = 16;
  const std::int64_t lines = (size + line - 1) / line;
  pool.run(threads, [&](int i) {
    loop(line * (lines * i / threads), std::min(size, line * (lines * (i + 1) / threads)));
  });
}

}  // namespace

extern "C" {

void limit_adam(std::int64_t size, int threads, float c, float* p, const float* g, float* m,
                float* v) {
  share(size, threads,
        [=](std::int64_t begin, std::int64_t end) { adam(begin, end, c, p, g, m, v); });
}

void limit_adam_16(std::int64_t size, int threads, float c, float* p, const float* g,
                   std::uint16_t* m, std::uint16_t* v) {
  share(size, threads,
        [=](std::int64_t begin, std::int64_t end) { adam(begin, end, c, p, g, m, v); });
}

void limit_adam_8(std::int64_t size, int threads, float c, float* p, const float* g,
                  std::uint8_t* m, std::uint8_t* v) {
  share(size, threads,
        [=](std::int64_t begin, std::int64_t end) { adam(begin, end, c, p, g, m, v); });
}

void limit_whole_step(std::int64_t size, int threads, float c, float* p, float* g, float* m,
                      float* v, float* a) {
  share(size, threads,
        [=](std::int64_t begin, std::int64_t end) { whole_step(begin, end, c, p, g, m, v, a); });
}

void limit_one_state(std::int64_t size, int threads, float c, float* p, const float* g, float* s) {
  share(size, threads,
        [=](std::int64_t begin, std::int64_t end) { one_state(begin, end, c, p, g, s); });
}

void limit_read(std::int64_t size, int threads, const float* p, float* sums) {
  share(size, threads, [=](std::int64_t begin, std::int64_t end) {
    read(begin, end, p, sums + threads * begin / size * 16);
  });
}

}  // extern "C"
