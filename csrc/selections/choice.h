// What a user asks for with where=: which part of a parameter a step may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "core/random.h"

namespace fusestep::selections {

struct Choice {
  enum class Kind { mask, random_blocks, cyclic_blocks, top };
  enum class Size { of_gradient, of_update };

  Kind kind;

  // What becomes of elements that are not selected. Frozen: value and state stay as they are.
  // Tracking: their state sees the gradient all the same.
  bool tracks = false;

  double fraction = 1;      // of random blocks, or of the top elements
  std::int64_t block = 1;   // elements of a random block
  std::int64_t blocks = 1;  // how many cyclic blocks there are
  Size by = Size::of_gradient;

  // One byte for each element of the parameter, or for each of its rows. Borrowed.
  struct Mask {
    std::byte* data = nullptr;
    std::vector<std::int64_t> shape, strides;
    Geometry geometry() const { return {shape, strides}; }
  };
  Mask mask = {};
};

// What random draws depend on, and which cyclic block has its turn.
struct Draw {
  std::uint64_t seed;
  std::int64_t step;  // steps taken before
  std::size_t parameter;

  RandomStream random() const {
    return RandomStream::of(seed, static_cast<std::uint64_t>(step),
                            static_cast<std::uint64_t>(parameter));
  }

  // For another purpose than blocks.
  RandomStream noise() const { return random().other(1); }

  // By which a parameter is rounded in its so many-th update.
  RandomStream rounding(std::int64_t update) const {
    return RandomStream::of_rounding(seed, update, parameter);
  }
};

}  // namespace fusestep::selections
