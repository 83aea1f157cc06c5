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

}  // namespace fusestep
