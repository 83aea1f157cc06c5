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

// Adds lanes in pairs; overwrites them. By constant widths, so that lanes may stay in registers.
template <int width = kLanes / 2>
FUSESTEP_HOST_DEVICE double sum_of_lanes(double* lane) {
  for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  if constexpr (width > 1) return sum_of_lanes<width / 2>(lane);
  return lane[0];
}

// lane[j] += value(j) + value(j + 32) + ... for a constant size, whole lanes: no branch, and no
// memory where lanes fit into registers.
template <int size, class Value>
FUSESTEP_HOST_DEVICE void add_to_lanes(double* lane, Value value) {
  static_assert(size % kLanes == 0);
  if constexpr (size > 0) {
    add_to_lanes<size - kLanes>(lane, value);
    for (int j = 0; j < kLanes; ++j) lane[j] += value(size - kLanes + j);
  }
}

// The sum of value(0) ... value(size - 1), for size <= kReductionGroup. Whole lanes go in twos:
// each pass reads and writes those that are not in registers.
template <class Value>
FUSESTEP_HOST_DEVICE double sum_in_lanes(std::int64_t size, Value value) {
  double lane[kLanes] = {};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes)
    add_to_lanes<2 * kLanes>(lane, [&](std::int64_t j) { return value(i + j); });
  if (i + kLanes <= size) {
    add_to_lanes<kLanes>(lane, [&](std::int64_t j) { return value(i + j); });
    i += kLanes;
  }
  for (int j = 0; i + j < size; ++j) lane[j] += value(i + j);
  return sum_of_lanes(lane);
}

// The same sum for a constant size.
template <int size, class Value>
FUSESTEP_HOST_DEVICE double sum_in_lanes(Value value) {
  double lane[kLanes] = {};
  add_to_lanes<size>(lane, value);
  return sum_of_lanes(lane);
}

// Sums `values`, which it overwrites.
double sum_in_groups(double* values, std::int64_t size);

// The sum of `size` values that are zero but for those at these places, which ascend: with the bits
// of the sum of all of them, in groups. Overwrites values; `groups` is working memory for `count`.
double sum_of_places(const std::int64_t* places, double* values, std::int64_t* groups,
                     std::int64_t count, std::int64_t size);

}  // namespace fusestep
