// The element types an array may have, and the C++ type of each.
#pragma once

#include <cstdint>

#include "core/annotations.h"
#include "core/half.h"

namespace fusestep {

// Floats, which are converted one by one; and integers that stand for parts of them: the lower
// half of a float32 (core/split.h), and state in 8 bits (core/blocks.h), signed or not.
enum class DType : std::uint8_t {
  float32,
  float64,
  float16,
  bfloat16,
  bits16,
  bits8,
  signed_bits8,
};
inline constexpr int kDTypes = 4;  // of floats

FUSESTEP_HOST_DEVICE constexpr bool is_float(DType dtype) { return dtype <= DType::bfloat16; }
FUSESTEP_HOST_DEVICE constexpr bool is_in_blocks(DType dtype) { return dtype >= DType::bits8; }
FUSESTEP_HOST_DEVICE constexpr bool is_signed(DType dtype) { return dtype == DType::signed_bits8; }

template <DType>
struct ElementOf;
template <>
struct ElementOf<DType::float32> {
  using type = float;
};
template <>
struct ElementOf<DType::float64> {
  using type = double;
};
template <>
struct ElementOf<DType::float16> {
  using type = Float16;
};
template <>
struct ElementOf<DType::bfloat16> {
  using type = BFloat16;
};

template <DType dtype>
using Element = typename ElementOf<dtype>::type;

FUSESTEP_HOST_DEVICE constexpr std::int64_t item_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : is_in_blocks(dtype) ? 1 : 2;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16",
                                   "uint16",  "uint8",   "uint8"};
  return names[static_cast<int>(dtype)];
}

// The type a rule computes in: float64 where the parameter or its state is, else float32.
template <class T>
inline constexpr DType kComputeType = sizeof(T) == 8 ? DType::float64 : DType::float32;

}  // namespace fusestep
