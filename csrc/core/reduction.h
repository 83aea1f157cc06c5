// Sums whose order is fixed, so that they have the same bits on any number of threads, on every
// instruction set and on a GPU.
//
// A group of up to 1,024 values is summed in 32 lanes: lane j takes values j, j + 32, j + 64, ...,
// then lanes are added in pairs (j and j + 16, j and j + 8, ...). Groups are summed in groups again
// until one value is left. 32 lanes are a GPU's warp, and whole vectors of every CPU.
#pragma once

#include <cstdint>

#include "core/annotations.h"

namespace fusestep {

inline constexpr std::int64_t kReductionGroup = 1024;

inline constexpr int kLanes = 32;

// Adds lanes in pairs; overwrites them.
FUSESTEP_HOST_DEVICE double sum_of_lanes(double* lane) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

// The sum of value(0) ... value(size - 1), for size <= kReductionGroup.
template <class Value>
FUSESTEP_HOST_DEVICE double sum_in_lanes(std::int64_t size, Value value) {
  double lane[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += value(i + j);
  for (int j = 0; i + j < size; ++j) lane[j] += value(i + j);
  return sum_of_lanes(lane);
}

// Sums `values`, which it overwrites.
double sum_in_groups(double* values, std::int64_t size);

// The sum of `size` values that are zero but for those at these places, which ascend: with the bits
// of the sum of all of them, in groups. Overwrites places and values.
double sum_of_places(std::int64_t* places, double* values, std::int64_t count, std::int64_t size);

}  // namespace fusestep
