#include "cpu/any_block.h"

namespace fusestep::cpu {
namespace {

template <bool is_signed>
SharedPower power_of(const float* values, std::int64_t size) {
  std::uint32_t largest = 0, finite = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t magnitude = magnitude_bits(values[i]);
    largest = larger(largest, magnitude);
    if (magnitude < kInfinityBits) finite = larger(finite, magnitude);
  }
  return largest < SharedPower::kHuge ? SharedPower::of<is_signed>(largest)
                                      : SharedPower::of_any<is_signed>(finite);
}

}  // namespace

template <bool is_signed>
void load_any_block(const std::uint8_t* codes, SharedPower power, float* to, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i)
    to[i] = SmallFloat<is_signed>::decode_any(codes[i], power.value());
}

template <bool is_signed>
void store_any_block(const float* from, std::uint8_t* codes, std::uint8_t* power, std::int64_t size,
                     const TileRandom* random, std::uint32_t first) {
  constexpr std::uint32_t kHalf = 1u << 31;
  const SharedPower shared = power_of<is_signed>(from, size);
  *power = shared.field;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t bits = random ? random->bits(first + static_cast<std::uint32_t>(i)) : kHalf;
    codes[i] = SmallFloat<is_signed>::encode_any(from[i], shared.inverse(), bits);
  }
}

template void load_any_block<false>(const std::uint8_t*, SharedPower, float*, std::int64_t);
template void load_any_block<true>(const std::uint8_t*, SharedPower, float*, std::int64_t);
template void store_any_block<false>(const float*, std::uint8_t*, std::uint8_t*, std::int64_t,
                                     const TileRandom*, std::uint32_t);
template void store_any_block<true>(const float*, std::uint8_t*, std::uint8_t*, std::int64_t,
                                    const TileRandom*, std::uint32_t);

}  // namespace fusestep::cpu
