// Which blocks of a parameter have their turn: a block is so many consecutive elements, in C order,
// and the last one may be shorter.
#pragma once

#include <cstdint>
#include <vector>

#include "selections/choice.h"

namespace fusestep::selections {

// In ascending order. Where a fraction of the blocks is not a whole number, it is rounded up or
// down at random, so that every block has the same chance: also the one block of a short bias.
std::vector<std::int64_t> draw_blocks(std::int64_t blocks, double fraction, const Draw& draw);

}  // namespace fusestep::selections
