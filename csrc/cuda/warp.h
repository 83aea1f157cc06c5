// Sums over the 32 threads of a warp, in the order of core/reduction.h.
#pragma once

#include <cstdint>

#include "core/reduction.h"
#include "cuda/arguments.h"

namespace fusestep::cuda {

// The sum of value(0) ... value(size - 1), for size <= kReductionGroup. All threads of a warp call
// it together, each adds up one lane, and all get the sum. On the host, one call stands for a warp.
template <int unroll = 8, class Value>
FUSESTEP_HOST_DEVICE double sum_in_warp([[maybe_unused]] int thread, int size, Value value) {
#if defined(__CUDA_ARCH__)
  constexpr unsigned kAll = 0xffffffff;
  double lane = 0;
#pragma unroll unroll
  for (int i = thread % kWarpSize; i < size; i += kWarpSize) lane += value(i);
  for (int width = kWarpSize / 2; width > 0; width /= 2)
    lane += __shfl_down_sync(kAll, lane, width);
  return __shfl_sync(kAll, lane, 0);
#else
  return sum_in_lanes(size, value);
#endif
}

}  // namespace fusestep::cuda
