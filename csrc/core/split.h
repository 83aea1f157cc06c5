// A float32 kept in two halves: a bfloat16, which a model can compute with, and the 16 bits that it
// has lost. Together they are the float32, to the bit, in the memory of one.
//
// The bfloat16 is the nearest one (of two that are equally near, the larger in magnitude), not the
// upper half of the bits, which would always be nearer to 0: whether it was rounded up is what the
// highest of the lower bits says. Nothing is rounded up to 0: where that is what others have
// written to the bfloat16, these bits do not count. So the number is always within half of its last
// place.
#pragma once

#include <cstdint>

#include "core/annotations.h"
#include "core/floating.h"
#include "core/half.h"

namespace fusestep {

struct Halves {
  BFloat16 upper;
  std::uint16_t lower;

  FUSESTEP_HOST_DEVICE static Halves of(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t upper = is_nan ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16;
    const std::uint32_t lower = is_nan ? 0u : bits & 0xffffu;
    return {{static_cast<std::uint16_t>(upper)}, static_cast<std::uint16_t>(lower)};
  }

  FUSESTEP_HOST_DEVICE float value() const {
    const std::uint32_t high = upper.bits, given = lower;
    const std::uint32_t low = (high & 0x7fffu) == 0 && given >= 0x8000u ? 0u : given;
    return bit_cast<float>(((high - (low >> 15)) << 16) | low);
  }
};

}  // namespace fusestep
