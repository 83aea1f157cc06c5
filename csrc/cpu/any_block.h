// Blocks of state in 8 bits that are not what nearly all of them are: short, or with something in
// them that is huge or not finite. Compiled once, for every machine.
#pragma once

#include <cstdint>

#include "core/blocks.h"
#include "core/random.h"

namespace fusestep::cpu {

template <bool is_signed>
void load_any_block(const std::uint8_t* codes, SharedPower power, float* to, std::int64_t size);

// The i-th element with the bits for the place `first` + i; without `random`, to nearest.
template <bool is_signed>
void store_any_block(const float* from, std::uint8_t* codes, std::uint8_t* power, std::int64_t size,
                     const TileRandom* random, std::uint32_t first);

}  // namespace fusestep::cpu
