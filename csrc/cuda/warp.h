// What the 32 threads of a warp do together: sums, in the order of core/reduction.h, and more. And
// what the sixteen of them do that have a block of state.
#pragma once

#include <cstdint>

#include "core/blocks.h"
#include "core/reduction.h"
#include "cuda/arguments.h"

namespace fusestep::cuda {

#if defined(__CUDA_ARCH__)
// The sum of one number of each thread.
__device__ __forceinline__ double sum_of_lanes(double lane) {
  constexpr unsigned kAll = 0xffffffff;
  for (int width = kWarpSize / 2; width > 0; width /= 2)
    lane += __shfl_down_sync(kAll, lane, width);
  return __shfl_sync(kAll, lane, 0);
}
#endif

// The sum of value(0) ... value(size - 1), for size <= kReductionGroup. All threads of a warp call
// it together, each adds up one lane, and all get the sum. On the host, one call stands for a warp.
template <int unroll = 8, class Value>
FUSESTEP_HOST_DEVICE double sum_in_warp([[maybe_unused]] int thread, int size, Value value) {
#if defined(__CUDA_ARCH__)
  double lane = 0;
#pragma unroll unroll
  for (int i = thread % kWarpSize; i < size; i += kWarpSize) lane += value(i);
  return sum_of_lanes(lane);
#else
  return sum_in_lanes(size, value);
#endif
}

// The same where it takes all threads to work out a value.
template <class Value>
FUSESTEP_HOST_DEVICE double sum_of_common_values([[maybe_unused]] int thread, int size,
                                                 Value value) {
#if defined(__CUDA_ARCH__)
  double lane = 0;
  for (int i = 0; i < size; ++i) {
    const double one = value(i);
    if (i % kWarpSize == thread % kWarpSize) lane += one;
  }
  return sum_of_lanes(lane);
#else
  return sum_in_lanes(size, value);
#endif
}

// The sum of such values of any number up to 1,024 to the power of `levels`, in groups of groups.
template <int levels = 3, class Value>
FUSESTEP_HOST_DEVICE double sum_in_groups(int thread, std::int64_t begin, std::int64_t end,
                                          Value value) {
  if constexpr (levels == 0) {
    return value(begin);
  } else {
    std::int64_t group = 1;
    for (int level = 1; level < levels; ++level) group *= kReductionGroup;
    if (end - begin == 1) return value(begin);
    const auto groups = static_cast<int>(ceil_div(end - begin, group));
    return sum_of_common_values(thread, groups, [&](int i) {
      const std::int64_t from = begin + i * group, to = from + group;
      return sum_in_groups<levels - 1>(thread, from, to < end ? to : end, value);
    });
  }
}

// Calls f(lane) in each thread of a warp with its number in it.
template <class Function>
FUSESTEP_HOST_DEVICE void in_each_lane([[maybe_unused]] int thread, Function f) {
#if defined(__CUDA_ARCH__)
  f(thread % kWarpSize);
#else
  for (int lane = 0; lane < kWarpSize; ++lane) f(lane);
#endif
}

// Whether f(lane) is true in all of them.
template <class Function>
FUSESTEP_HOST_DEVICE bool in_all_lanes([[maybe_unused]] int thread, Function f) {
#if defined(__CUDA_ARCH__)
  constexpr unsigned kAll = 0xffffffff;
  return __all_sync(kAll, f(thread % kWarpSize)) != 0;
#else
  bool all = true;
  for (int lane = 0; lane < kWarpSize; ++lane) all = f(lane) && all;
  return all;
#endif
}

// The same for the threads that have a block of state; on the host, one call stands for these.
template <class Function>
FUSESTEP_HOST_DEVICE void in_each_lane_of_block([[maybe_unused]] int thread, Function f) {
#if defined(__CUDA_ARCH__)
  f(thread % kLanesOfBlock);
#else
  for (int lane = 0; lane < kLanesOfBlock; ++lane) f(lane);
#endif
}

// The largest f(lane) of theirs.
template <class Function>
FUSESTEP_HOST_DEVICE std::uint32_t largest_in_block([[maybe_unused]] int thread, Function f) {
#if defined(__CUDA_ARCH__)
  const int first = thread % kWarpSize / kLanesOfBlock * kLanesOfBlock;
  const unsigned lanes = ((1u << kLanesOfBlock) - 1) << first;
  std::uint32_t largest = f(thread % kLanesOfBlock);
#pragma unroll
  for (int width = kLanesOfBlock / 2; width > 0; width /= 2)
    largest = larger(largest, __shfl_xor_sync(lanes, largest, width));
  return largest;
#else
  std::uint32_t largest = 0;
  for (int lane = 0; lane < kLanesOfBlock; ++lane) largest = larger(largest, f(lane));
  return largest;
#endif
}

// What each of them keeps from one of these calls to the next.
template <class Value>
class OfEachLane {
 public:
#if defined(__CUDA_ARCH__)
  FUSESTEP_HOST_DEVICE Value& of(int) { return value_; }

 private:
  Value value_;
#else
  FUSESTEP_HOST_DEVICE Value& of(int lane) { return value_[lane]; }

 private:
  Value value_[kLanesOfBlock];
#endif
};

// What any thread of a warp has done with memory, all of it know from here on.
FUSESTEP_HOST_DEVICE void sync_warp() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

}  // namespace fusestep::cuda
