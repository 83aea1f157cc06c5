#include "core/reduction.h"

namespace fusestep {

double sum_in_groups(double* values, std::int64_t size) {
  while (size > 1) {
    std::int64_t groups = 0;
    for (std::int64_t begin = 0; begin < size; begin += kReductionGroup) {
      const std::int64_t count = size - begin < kReductionGroup ? size - begin : kReductionGroup;
      values[groups++] = sum_in_lanes(count, [&](std::int64_t i) { return values[begin + i]; });
    }
    size = groups;
  }
  return size == 1 ? values[0] : 0;
}

namespace {

// As sum_of_lanes, but leaves them as they are.
template <int first = 0, int width = 1>
double sum_of_kept_lanes(const double* lane) {
  if constexpr (width < kLanes)
    return sum_of_kept_lanes<first, 2 * width>(lane) +
           sum_of_kept_lanes<first + width, 2 * width>(lane);
  return lane[first];
}

// `lane` has zeros, before and after.
double sum_of_group(const std::int64_t* places, const double* values, std::int64_t count,
                    double* lane) {
  // One or two have no order. (A lane begins with 0, which makes 0 of -0.)
  if (count == 1) return 0 + values[0];
  if (count == 2) return (0 + values[0]) + values[1];
  const auto lane_of = [&](std::int64_t i) {
    return static_cast<std::uint64_t>(places[i]) % kLanes;
  };
  for (std::int64_t i = 0; i < count; ++i) lane[lane_of(i)] += values[i];
  const double sum = sum_of_kept_lanes(lane);
  for (std::int64_t i = 0; i < count; ++i) lane[lane_of(i)] = 0;
  return sum;
}

}  // namespace

double sum_of_places(const std::int64_t* places, double* values, std::int64_t* groups,
                     std::int64_t count, std::int64_t size) {
  double lane[kLanes] = {};
  do {
    std::int64_t found = 0;
    for (std::int64_t begin = 0, end = 0; begin < count; begin = end) {
      const std::int64_t group = places[begin] / kReductionGroup;
      const std::int64_t next = (group + 1) * kReductionGroup;
      while (end < count && places[end] < next) ++end;
      values[found] = sum_of_group(places + begin, values + begin, end - begin, lane);
      groups[found++] = group;
    }
    places = groups;
    count = found;
    size = (size + kReductionGroup - 1) / kReductionGroup;
  } while (size > 1);
  return count > 0 ? values[0] : 0;
}

}  // namespace fusestep
