#include "selections/blocks.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"

namespace fusestep::selections {
namespace {

std::int64_t rounded_at_random(double expected, const RandomStream& random) {
  const double whole = std::floor(expected);
  constexpr std::uint64_t kNumber = ~std::uint64_t{0} - 1;  // of which no block has one
  return static_cast<std::int64_t>(whole) + (random.uniform(kNumber) < expected - whole);
}

// `count` of the numbers below n, each set of so many with the same probability: Floyd's algorithm
// (Bentley & Floyd 1987, "A sample of brilliance"), which draws `count` times and no more.
std::vector<bool> sample(std::int64_t n, std::int64_t count, const RandomStream& random) {
  std::vector<bool> chosen(static_cast<std::size_t>(n));
  for (std::int64_t last = n - count; last < n; ++last) {
    const double drawn =
        random.uniform(static_cast<std::uint64_t>(last)) * static_cast<double>(last + 1);
    const auto number = static_cast<std::size_t>(drawn);
    chosen[chosen[number] ? static_cast<std::size_t>(last) : number] = true;
  }
  return chosen;
}

}  // namespace

std::vector<std::int64_t> draw_blocks(std::int64_t blocks, double fraction, const Draw& draw) {
  const RandomStream random = draw.random();
  const std::int64_t count =
      std::min(blocks, rounded_at_random(fraction * static_cast<double>(blocks), random));
  // Those, or all but the others.
  const bool is_drawn = count <= blocks - count;
  const std::vector<bool> found = sample(blocks, is_drawn ? count : blocks - count, random);

  std::vector<std::int64_t> drawn;
  drawn.reserve(static_cast<std::size_t>(count));
  for (std::int64_t block = 0; block < blocks; ++block)
    if (found[static_cast<std::size_t>(block)] == is_drawn) drawn.push_back(block);
  return drawn;
}

}  // namespace fusestep::selections
