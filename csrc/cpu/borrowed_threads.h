// The threads that torch's own operators run on.
//
// Where torch uses OpenMP, its threads go on spinning for milliseconds after a matmul. A second
// pool then gets no processor: a step of 3M parameters after a backward pass took as long on two
// threads as on one. So a step for torch runs on torch's threads, if there are any to be found.
//
// Nothing is linked: the entry point of the OpenMP runtime (GNU's, which LLVM's and Intel's offer,
// too) is looked up in what torch has loaded.
#pragma once

#include "cpu/thread_pool.h"

namespace fusestep::cpu {

// While this lives, parallel_for and num_threads on this thread mean torch's threads. Without
// effect where torch has none, in a forked child (OpenMP does not outlive a fork), and where the
// user has said how many threads fusestep may use: then it is our own pool, as always.
class BorrowedThreads {
 public:
  BorrowedThreads();
  ~BorrowedThreads();
  BorrowedThreads(const BorrowedThreads&) = delete;
  BorrowedThreads& operator=(const BorrowedThreads&) = delete;
};

namespace borrowed {

// How many there are for this thread at this moment; 0 where none are borrowed.
int threads();

// As parallel_for, on borrowed threads.
void run(std::int64_t chunks, int threads, ChunkFunction function, void* context,
         const Errand& errand);

}  // namespace borrowed
}  // namespace fusestep::cpu
