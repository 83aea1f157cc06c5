// Random numbers from a counter: a function of what they are for (seed, step, parameter, number),
// never of anything drawn before. So they are the same on any number of threads and on every
// device, and a step that is taken again draws them again.
#pragma once

#include <cstdint>

#include "core/annotations.h"

namespace fusestep {

// The finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
// generators", figure 16, with the constants of Stafford's variant 13): a bijection in which every
// bit of x changes half of the result's.
FUSESTEP_HOST_DEVICE std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// One stream of random numbers for each parameter in each step.
struct RandomStream {
  std::uint64_t key;

  FUSESTEP_HOST_DEVICE static RandomStream of(std::uint64_t seed, std::uint64_t step,
                                              std::uint64_t parameter) {
    constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ull;  // apart even for seeds 0, 1, 2, ...
    std::uint64_t key = mixed(seed + kGolden);
    key = mixed((key ^ step) + kGolden);
    key = mixed((key ^ parameter) + kGolden);
    return {key};
  }

  // Another stream for the same, for each purpose that is not 0.
  FUSESTEP_HOST_DEVICE RandomStream other(std::uint64_t purpose) const {
    return {mixed(key ^ mixed(purpose))};
  }

  // By which a parameter is rounded in its so many-th update.
  FUSESTEP_HOST_DEVICE static RandomStream of_rounding(std::uint64_t seed, std::int64_t update,
                                                       std::uint64_t parameter) {
    return of(seed, static_cast<std::uint64_t>(update), parameter).other(2);
  }

  // Of one of its operands.
  FUSESTEP_HOST_DEVICE RandomStream of_operand(int operand) const {
    return other(static_cast<std::uint64_t>(operand) + 1);
  }

  // 64 random bits for each number.
  FUSESTEP_HOST_DEVICE std::uint64_t bits(std::uint64_t number) const {
    return mixed(key + 0x9e3779b97f4a7c15ull * (number + 1));
  }

  // In [0, 1), a multiple of 2^-53.
  FUSESTEP_HOST_DEVICE double uniform(std::uint64_t number) const {
    return static_cast<double>(bits(number) >> 11) * 0x1p-53;
  }
};

// 32 random bits for each place of a tile: cheap enough for every element of every step, and in
// 32-bit arithmetic, which all vectors have.
struct TileRandom {
  std::uint32_t key;
  bool is_second = false;

  // Of one of the operands of a parameter's step. Two pieces of state share their bits, of which
  // the second has the lower half first: to make others would take a tenth of a step of state in 8
  // bits. Of the 20 that each takes at most, 8 are the other's, too: the highest four of one are
  // the lowest of the other.
  FUSESTEP_HOST_DEVICE static TileRandom of(const RandomStream& stream, int operand,
                                            std::int64_t tile) {
    const std::uint64_t bits =
        stream.of_operand(operand / 2 * 2).bits(static_cast<std::uint64_t>(tile));
    return {static_cast<std::uint32_t>(bits >> 32), operand % 2 != 0};
  }

  // One round of multiplying and shifting, by the number itself. Of 20,000 keys with 1,024 places
  // each, its bits are even, and those of two places have correlations below 0.004; one round with
  // a constant for a factor has 0.06, and a second round takes a tenth of a step of state in 8
  // bits.
  FUSESTEP_HOST_DEVICE std::uint32_t bits(std::uint32_t place) const {
    std::uint32_t x = at(place).key;
    x ^= x >> 15;
    x *= x | 1u;
    x ^= x >> 16;
    // A mask, since a long loop that has to ask does not become vectors.
    const std::uint32_t turned = x << 16 | x >> 16, mask = is_second ? ~0u : 0u;
    return x ^ ((x ^ turned) & mask);
  }

  // The same for places that are counted from this one.
  FUSESTEP_HOST_DEVICE TileRandom at(std::uint32_t place) const {
    return {key + 0x9e3779b9u * place, is_second};
  }
};

}  // namespace fusestep
