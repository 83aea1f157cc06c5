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

double sum_of_group(const std::int64_t* places, const double* values, std::int64_t count) {
  // One or two have no order. (A lane begins with 0, which makes 0 of -0.)
  if (count == 1) return 0 + values[0];
  if (count == 2) return (0 + values[0]) + values[1];
  double lane[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lane[places[i] % kLanes] += values[i];
  return sum_of_lanes(lane);
}

}  // namespace

double sum_of_places(std::int64_t* places, double* values, std::int64_t count, std::int64_t size) {
  do {
    std::int64_t groups = 0;
    for (std::int64_t begin = 0, end = 0; begin < count; begin = end) {
      const std::int64_t group = places[begin] / kReductionGroup;
      while (end < count && places[end] / kReductionGroup == group) ++end;
      values[groups] = sum_of_group(places + begin, values + begin, end - begin);
      places[groups++] = group;
    }
    count = groups;
    size = (size + kReductionGroup - 1) / kReductionGroup;
  } while (size > 1);
  return count > 0 ? values[0] : 0;
}

}  // namespace fusestep
