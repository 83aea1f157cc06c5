#include "core/reduction.h"

#include <utility>

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

// Not by a loop, which compilers make a string instruction of.
template <std::size_t... j>
void clear(double* lane, std::index_sequence<j...>) {
  ((lane[j] = 0), ...);
}

std::size_t lane_of(std::int64_t place) { return static_cast<std::size_t>(place) % kLanes; }

// Takes the sum of `count` values from the lanes they have been added to, and leaves zeros.
double take_sum(const std::int64_t* places, const double* values, std::int64_t count,
                double* lane) {
  if (count > 2) {
    const double sum = sum_of_kept_lanes(lane);
    clear(lane, std::make_index_sequence<kLanes>{});
    return sum;
  }
  // One or two have no order. (A lane begins with 0, which makes 0 of -0.)
  lane[lane_of(places[0])] = lane[lane_of(places[count - 1])] = 0;
  return count == 1 ? 0 + values[0] : (0 + values[0]) + values[1];
}

}  // namespace

double sum_of_places(const std::int64_t* places, double* values, std::int64_t* groups,
                     std::int64_t count, std::int64_t size) {
  double lane[kLanes] = {};
  do {
    std::int64_t found = 0, begin = 0, group = 0;
    const auto close_group = [&](std::int64_t end) {
      if (begin == end) return;
      values[found] = take_sum(places + begin, values + begin, end - begin, lane);
      groups[found++] = group;
      begin = end;
    };
    // One loop for all groups: the end of a loop for each would be guessed wrong each time.
    for (std::int64_t i = 0; i < count; ++i) {
      if (places[i] >= (group + 1) * kReductionGroup) {
        close_group(i);
        group = places[i] / kReductionGroup;
      }
      lane[lane_of(places[i])] += values[i];
    }
    close_group(count);
    places = groups;
    count = found;
    size = (size + kReductionGroup - 1) / kReductionGroup;
  } while (size > 1);
  return count > 0 ? values[0] : 0;
}

}  // namespace fusestep
