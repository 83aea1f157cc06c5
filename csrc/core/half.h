// float16 and bfloat16: storage types that are converted to float before any arithmetic.
//
// Written with integer operations and selects only, because g++ 12 vectorises these on every
// instruction set, while it scalarises _Float16 conversions where AVX512-FP16 is missing. That also
// makes every tier give the same bits, NaN payloads included.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep {

struct Float16 {  // IEEE binary16
  std::uint16_t bits;
};

struct BFloat16 {  // the upper half of a binary32
  std::uint16_t bits;
};

FUSESTEP_HOST_DEVICE float to_float(BFloat16 h) {
  return bit_cast<float>(std::uint32_t{h.bits} << 16);
}

FUSESTEP_HOST_DEVICE float to_float(Float16 h) {
  const std::uint32_t magnitude = h.bits & 0x7fffu;
  const std::uint32_t sign = (h.bits & 0x8000u) << 16;
  const std::uint32_t rebias = 112u << 23;  // exponent bias 127 against 15
  const std::uint32_t normal = (magnitude << 13) + rebias;
  const std::uint32_t special = normal + rebias;  // Inf and NaN keep an all-ones exponent
  const std::uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  std::uint32_t bits = magnitude < 0x400u ? subnormal : normal;
  bits = magnitude >= 0x7c00u ? (special | quiet) : bits;
  return bit_cast<float>(bits | sign);
}

// Round to nearest, ties to even. NaN stays NaN.
FUSESTEP_HOST_DEVICE BFloat16 to_bfloat16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const std::uint32_t quiet_nan = bits | 0x400000u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>((is_nan ? quiet_nan : rounded) >> 16)};
}

// Round to nearest, ties to even; beyond 65,519 to infinity. NaN stays NaN.
FUSESTEP_HOST_DEVICE Float16 to_float16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t normal =
      ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // Adding 1/2 leaves a float whose last place is 2^-24, the smallest float16: the hardware rounds.
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? nan : half;
  return {static_cast<std::uint16_t>(half | sign)};
}

// Rounded up or down at random, so that the mean is x: of 32 random bits, so many of the lowest are
// added as there are to be dropped. (Gupta et al. 2015, "Deep learning with limited numerical
// precision", section 3.) What is not finite, or beyond the largest number, is rounded to nearest.
inline constexpr std::uint32_t kLargestBFloat16 = 0x7f7f0000u;

// Of what is less than the largest number.
FUSESTEP_HOST_DEVICE BFloat16 to_smaller_bfloat16(float x, std::uint32_t random) {
  return {static_cast<std::uint16_t>((bit_cast<std::uint32_t>(x) + (random & 0xffffu)) >> 16)};
}

FUSESTEP_HOST_DEVICE BFloat16 to_bfloat16(float x, std::uint32_t random) {
  const bool has_room = (bit_cast<std::uint32_t>(x) & 0x7fffffffu) < kLargestBFloat16;
  return {has_room ? to_smaller_bfloat16(x, random).bits : to_bfloat16(x).bits};
}

FUSESTEP_HOST_DEVICE Float16 to_float16(float x, std::uint32_t random) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t dropped = random & 0x1fffu;
  const std::uint32_t normal = ((magnitude + dropped) >> 13) - (112u << 10);
  // In units of 2^-37, of which the smallest float16 has 2^13.
  const bool is_small = magnitude < 0x38800000u;
  const float small = is_small ? bit_cast<float>(magnitude) * 0x1p37f : 0.0f;
  const std::uint32_t subnormal =
      (static_cast<std::uint32_t>(static_cast<std::int32_t>(small)) + dropped) >> 13;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t half = sign | (is_small ? subnormal : normal);
  const bool has_room = magnitude < 0x477fe000u;
  return {has_room ? static_cast<std::uint16_t>(half) : to_float16(x).bits};
}

// double -> float such that a second rounding, to a 16-bit type, is as if it had been the only one
// (round to odd: Boldo & Melquiond 2008).
FUSESTEP_HOST_DEVICE float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = static_cast<double>(nearest);
  const double away = back < 0 ? -back : back;
  const double exact = x < 0 ? -x : x;
  std::uint32_t bits = bit_cast<std::uint32_t>(nearest);
  bits -= away > exact ? 1u : 0u;           // towards zero
  bits |= (back != x && x == x) ? 1u : 0u;  // a last bit of 1 remembers that digits were lost
  return bit_cast<float>(bits);
}

// One spelling for every pair of types: cast<To>(from).
template <class To>
struct Cast {
  FUSESTEP_HOST_DEVICE static To of(float x) { return static_cast<To>(x); }
  FUSESTEP_HOST_DEVICE static To of(double x) { return static_cast<To>(x); }
  FUSESTEP_HOST_DEVICE static To of(Float16 x) { return static_cast<To>(to_float(x)); }
  FUSESTEP_HOST_DEVICE static To of(BFloat16 x) { return static_cast<To>(to_float(x)); }
};

template <>
struct Cast<Float16> {
  FUSESTEP_HOST_DEVICE static Float16 of(float x) { return to_float16(x); }
  FUSESTEP_HOST_DEVICE static Float16 of(double x) { return to_float16(round_to_odd(x)); }
};

template <>
struct Cast<BFloat16> {
  FUSESTEP_HOST_DEVICE static BFloat16 of(float x) { return to_bfloat16(x); }
  FUSESTEP_HOST_DEVICE static BFloat16 of(double x) { return to_bfloat16(round_to_odd(x)); }
};

template <class To, class From>
FUSESTEP_HOST_DEVICE To cast(From x) {
  return Cast<To>::of(x);
}

// The same, rounded at random where digits are dropped that a rule may need: for 16-bit types.
FUSESTEP_HOST_DEVICE float rounded_once(float x) { return x; }
FUSESTEP_HOST_DEVICE float rounded_once(double x) { return round_to_odd(x); }

template <class To, class T>
FUSESTEP_HOST_DEVICE To cast_at_random(T x, std::uint32_t random) {
  if constexpr (std::is_same_v<To, BFloat16>) return to_bfloat16(rounded_once(x), random);
  if constexpr (std::is_same_v<To, Float16>) return to_float16(rounded_once(x), random);
  return cast<To>(x);
}

}  // namespace fusestep
