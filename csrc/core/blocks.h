// State in 8 bits: small floats, of which 64 neighbours share a power of two.
//
// A block's power of two brings the largest of its magnitudes to (1/2, 1]. A code is 3 bits of the
// mantissa of such a float, and the lowest bits of its exponent: 4, and a sign, of moments; 5 of
// mean squares, which have none. Nothing has to be rebiased, and what is rounded up to 1 has a
// code. The numbers of a block with a larger power are among those of a block with a smaller one:
// what has been decoded is encoded to the same value again.
//
// Codes of magnitudes, with 4 bits of exponent; in brackets, with 5:
//
//       0 ... 7           subnormal: m 2^-17             (there are none)
//       8 ... 119         (1 + m / 8) 2^(e - 15)         (0 ... 247: (1 + m / 8) 2^(e - 31))
//       120               1                              (248)
//       126, 127          infinity, NaN                  (254, 255)
//
// So the least step of a moment, 2^-17 of the largest one, and the root of the least mean square,
// 2^-15.5, are about the same: no element is divided by a root that has been rounded to nothing,
// which is why mean squares have no code for 0 (a block of zeros has no power of two). Chosen from
// eighteen formats, by what they do to training: docs/adr/0012.
#pragma once

#include <cstdint>

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep {

inline constexpr std::int64_t kBlockElements = 64;

FUSESTEP_HOST_DEVICE constexpr std::int64_t blocks_of(std::int64_t elements) {
  return (elements + kBlockElements - 1) / kBlockElements;
}

inline constexpr std::uint32_t kMagnitudeBits = 0x7fffffffu, kInfinityBits = 0x7f800000u;

FUSESTEP_HOST_DEVICE std::uint32_t magnitude_bits(float x) {
  return bit_cast<std::uint32_t>(x) & kMagnitudeBits;
}

// Of positive floats, too, whose bits are in their order: one instruction, which a comparison of
// floats is not.
FUSESTEP_HOST_DEVICE std::uint32_t smaller(std::uint32_t a, std::uint32_t b) {
  return a < b ? a : b;
}
FUSESTEP_HOST_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
  return a < b ? b : a;
}

template <bool is_signed>
struct SmallFloat {
  static constexpr int kExponentBits = is_signed ? 4 : 5;
  static constexpr std::uint32_t kNan = (1u << (kExponentBits + 3)) - 1, kInfinity = kNan - 1;
  static constexpr std::uint32_t kLargest = kInfinity - 1;

  // Bits of the mantissa that a code does not have; of 32 random ones, so many are added before
  // they are dropped: up or down, with the odds that make the mean exact.
  static constexpr int kDropped = 20;

  // The least exponent field, in place, which becomes 0.
  static constexpr std::uint32_t kField = 1u << 23;
  static constexpr std::uint32_t kLowest = (128u - (1u << kExponentBits)) * kField;

  // `x` is not less than 0 and, times the inverse of its block's power, not above 1.
  FUSESTEP_HOST_DEVICE static std::uint32_t encode_magnitude(float x, float inverse,
                                                             std::uint32_t random) {
    const float scaled = x * inverse;
    std::uint32_t least = kLowest;
    if constexpr (is_signed) {  // the sum is below the least normal one, and its mantissa the code
      const float least_normal = bit_cast<float>(kLowest + kField);
      least = bit_cast<std::uint32_t>(scaled + least_normal) - kField;
    }
    const std::uint32_t bits = larger(bit_cast<std::uint32_t>(scaled), least);
    return (bits + (random >> (32 - kDropped))) >> kDropped & kNan;
  }

  FUSESTEP_HOST_DEVICE static float decode_magnitude(std::uint32_t code, float power) {
    const float normal = bit_cast<float>((code << kDropped) + kLowest);
    if constexpr (!is_signed) return normal * power;
    const float subnormal = (normal + normal) - bit_cast<float>(kLowest + kField);
    return bit_cast<float>(
               smaller(bit_cast<std::uint32_t>(normal), bit_cast<std::uint32_t>(subnormal))) *
           power;
  }

  // Of a block with nothing in it that is not finite, or huge.
  FUSESTEP_HOST_DEVICE static std::uint8_t encode(float x, float inverse, std::uint32_t random) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t code =
        encode_magnitude(bit_cast<float>(bits & kMagnitudeBits), inverse, random);
    return static_cast<std::uint8_t>(is_signed ? code | (bits >> 24 & 0x80u) : code);
  }
  FUSESTEP_HOST_DEVICE static float decode(std::uint8_t code, float power) {
    const std::uint32_t wide = code;
    const float magnitude = decode_magnitude(wide & kNan, power);
    if constexpr (!is_signed) return magnitude;
    return bit_cast<float>(bit_cast<std::uint32_t>(magnitude) | (wide & 0x80u) << 24);
  }

  // Of any block. A NaN has no sign: which one comes of an operation is the processor's choice.
  FUSESTEP_HOST_DEVICE static std::uint8_t encode_any(float x, float inverse,
                                                      std::uint32_t random) {
    const std::uint32_t magnitude = magnitude_bits(x);
    const float most = decode_magnitude(kLargest, 1.0f);
    const float scaled = bit_cast<float>(magnitude) * inverse;
    std::uint32_t code = scaled < most ? encode_magnitude(scaled, 1.0f, random) : kLargest;
    if (magnitude >= kInfinityBits) code = magnitude > kInfinityBits ? kNan : kInfinity;
    const bool has_sign = is_signed && magnitude <= kInfinityBits;
    const std::uint32_t sign = bit_cast<std::uint32_t>(x) >> 24 & 0x80u;
    return static_cast<std::uint8_t>(has_sign ? code | sign : code);
  }
  FUSESTEP_HOST_DEVICE static float decode_any(std::uint8_t code, float power) {
    const std::uint32_t magnitude = code & kNan;
    if (magnitude < kInfinity) return decode(code, power);
    const std::uint32_t bits = magnitude == kInfinity ? kInfinityBits : kInfinityBits | 0x400000u;
    const std::uint32_t sign = is_signed ? std::uint32_t{code} >> 7 << 31 : 0u;
    return bit_cast<float>(bits | sign);
  }
};

// The power of two that a block shares, as the exponent field of a float: 2^(field - 127), or 0 for
// a block of nothing but zeros.
struct SharedPower {
  std::uint8_t field;

  // From 2^126 on, infinities and NaN included: they take another path.
  static constexpr std::uint32_t kHuge = 0x7e800000u;

  // Given the bits of the largest magnitude, which is less. So small that codes would decode to
  // subnormal numbers it does not become.
  template <bool is_signed>
  FUSESTEP_HOST_DEVICE static SharedPower of(std::uint32_t largest) {
    constexpr std::uint32_t kLeast = is_signed ? 18 : 32;
    const std::uint32_t field = ((largest - 1) >> 23) + 1;
    return {static_cast<std::uint8_t>(largest == 0 ? 0 : larger(field, kLeast))};
  }

  // The same for a block of any numbers, given the largest finite one.
  template <bool is_signed>
  FUSESTEP_HOST_DEVICE static SharedPower of_any(std::uint32_t largest) {
    const std::uint32_t field = of<is_signed>(largest).field;
    return {static_cast<std::uint8_t>(field == 0 ? 1u : smaller(field, 253u))};
  }

  FUSESTEP_HOST_DEVICE float value() const { return bit_cast<float>(std::uint32_t{field} << 23); }
  FUSESTEP_HOST_DEVICE float inverse() const {
    return field == 0 ? 0.0f : bit_cast<float>((254u - field) << 23);
  }
};

}  // namespace fusestep
