#include "selections/blocks.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "selections/permutation.h"

namespace fusestep::selections {
namespace {

std::int64_t rounded_at_random(double expected, const RandomStream& random) {
  const double whole = std::floor(expected);
  constexpr std::uint64_t kNumber = ~std::uint64_t{0} - 1;  // none that the permutation uses
  return static_cast<std::int64_t>(whole) + (random.uniform(kNumber) < expected - whole);
}

}  // namespace

std::vector<std::int64_t> draw_blocks(std::int64_t blocks, double fraction, const Draw& draw) {
  const auto random = RandomStream::of(draw.seed, static_cast<std::uint64_t>(draw.step),
                                       static_cast<std::uint64_t>(draw.parameter));
  const std::int64_t count =
      std::min(blocks, rounded_at_random(fraction * static_cast<double>(blocks), random));
  // Drawn are the first `count` entries of a random permutation: those, or all but the rest.
  const bool is_drawn = count <= blocks - count;
  const Permutation permutation(blocks, random);
  std::vector<bool> found(static_cast<std::size_t>(blocks));
  for (std::int64_t i = is_drawn ? 0 : count; i < (is_drawn ? count : blocks); ++i)
    found[static_cast<std::size_t>(permutation(i))] = true;

  std::vector<std::int64_t> drawn;
  drawn.reserve(static_cast<std::size_t>(count));
  for (std::int64_t block = 0; block < blocks; ++block)
    if (found[static_cast<std::size_t>(block)] == is_drawn) drawn.push_back(block);
  return drawn;
}

}  // namespace fusestep::selections
