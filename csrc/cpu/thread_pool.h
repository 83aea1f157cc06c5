// The threads a large step is spread over.
//
// Our own small pool rather than OpenMP: a process that has used libgomp hangs in its first
// parallel region after fork(), and data-loader workers are forked. Work is handed out in chunks
// that threads claim one by one, so a thread that wakes late or is preempted delays nobody; which
// thread computes a chunk never changes its bits.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <type_traits>

namespace fusestep::cpu {

// Threads a step may use, the calling one included. At start: FUSESTEP_NUM_THREADS, else
// OMP_NUM_THREADS, else the processors this process may run on.
int num_threads();
int own_threads();            // of our own pool, whatever is borrowed
void set_num_threads(int n);  // throws ValueError unless 1 <= n <= kMaxThreads

// True where somebody has said how many: set_num_threads, or FUSESTEP_NUM_THREADS.
bool threads_are_chosen();

inline constexpr int kMaxThreads = 1024;

// Counts fork()s: a lock that was taken under another count was taken by a thread this process
// does not have.
std::uint64_t fork_generation();

using ChunkFunction = void (*)(void* context, std::int64_t chunk);

// What the calling thread does first, while others are at work already. May be empty.
using Errand = std::function<void()>;

// Calls function(context, i) for every i in [0, chunks), on up to `threads` threads, and returns
// when all calls have. Neither the function nor the errand may throw. Safe to call from several
// threads at once: who finds the pool busy works alone.
void parallel_for(std::int64_t chunks, int threads, ChunkFunction function, void* context,
                  const Errand& errand);

template <class Function>
void parallel_for(std::int64_t chunks, int threads, Function&& function,
                  const Errand& errand = {}) {
  parallel_for(
      chunks, threads,
      [](void* context, std::int64_t chunk) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(chunk);
      },
      &function, errand);
}

// Wakes the threads that a parallel_for is about to need, which takes them some 10 to 50 us. They
// stay awake for at most kAlertTime.
void rouse(int threads);

inline constexpr std::chrono::microseconds kAlertTime{300};

}  // namespace fusestep::cpu
