// Launching a body. The only place with <<< >>>.
//
// Compiled by nvcc, a launch goes to a GPU's stream. Compiled by a C++ compiler it is a loop over
// the grid: every access to memory is the same then, and can be watched by sanitizers.
#pragma once

#include <cstdint>

#include "cuda/arguments.h"
#include "cuda/bodies.h"
#include "cuda/runtime.h"

namespace fusestep::cuda {

#if defined(__CUDACC__)

// For Blackwell ptxas spills registers to have more blocks on a processor than it was asked for,
// unless it is told that one is enough. Elsewhere that would only cost registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define FUSESTEP_LAUNCH_BOUNDS __launch_bounds__(kThreads, 1)
#else
#define FUSESTEP_LAUNCH_BOUNDS __launch_bounds__(kThreads)
#endif

template <class Body>
__global__ void FUSESTEP_LAUNCH_BOUNDS run(const __grid_constant__ Body body) {
  body(static_cast<std::int64_t>(blockIdx.x), static_cast<int>(threadIdx.x));
}

// Likewise everywhere for bodies with strides, or as many operands as there may be.
template <class Body>
  requires(kMayBeAnchored<typename Body::Item> || decltype(Body::list)::kAxes > 0)
__global__ void __launch_bounds__(kThreads, 1) run(const __grid_constant__ Body body) {
  body(static_cast<std::int64_t>(blockIdx.x), static_cast<int>(threadIdx.x));
}

template <class Body>
void launch(const Body& body, std::int64_t blocks, Stream stream) {
  static_assert(sizeof(Body) <= kMostParameterBytes);
  if (blocks == 0) return;
  run<<<static_cast<unsigned>(blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(body);
  check_launch();
}

#else

template <class Body>
void launch(const Body& body, std::int64_t blocks, Stream) {
  static_assert(sizeof(Body) <= kMostParameterBytes);
  for (std::int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < kThreads; thread += threads_of(Body::kTeam)) body(block, thread);
}

#endif

}  // namespace fusestep::cuda
