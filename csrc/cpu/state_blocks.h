// State in 8 bits (core/blocks.h), made from floats and made into floats.
#pragma once

#include <cstdint>
#include <span>

namespace fusestep::cpu {

// Rounded to nearest. There are as many codes as values, and blocks_of(values) powers.
void encode_state(std::span<const float> values, bool is_signed, std::uint8_t* codes,
                  std::uint8_t* powers);
void decode_state(std::span<const std::uint8_t> codes, const std::uint8_t* powers, bool is_signed,
                  float* values);

}  // namespace fusestep::cpu
