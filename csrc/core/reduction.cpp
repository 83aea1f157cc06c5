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

double sum_of_places(std::int64_t* places, double* values, std::int64_t count, std::int64_t size) {
  do {
    std::int64_t groups = 0;
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t group = places[i] / kReductionGroup;
      double lane[kLanes] = {};
      for (; i < count && places[i] / kReductionGroup == group; ++i)
        lane[places[i] % kLanes] += values[i];
      places[groups] = group;
      values[groups++] = sum_of_lanes(lane);
    }
    count = groups;
    size = (size + kReductionGroup - 1) / kReductionGroup;
  } while (size > 1);
  return count > 0 ? values[0] : 0;
}

}  // namespace fusestep
