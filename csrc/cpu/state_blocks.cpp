#include "cpu/state_blocks.h"

#include <algorithm>

#include "cpu/any_block.h"
#include "cpu/fp_environment.h"

namespace fusestep::cpu {
namespace {

// Calls visit(first element, elements, block) for each block of so many elements.
template <class Visit>
void for_each_block(std::int64_t size, Visit visit) {
  for (std::int64_t block = 0, begin = 0; begin < size; ++block, begin += kBlockElements)
    visit(begin, std::min(kBlockElements, size - begin), block);
}

}  // namespace

void encode_state(std::span<const float> values, bool is_signed, std::uint8_t* codes,
                  std::uint8_t* powers) {
  const IeeeEnvironment ieee;
  const auto store = is_signed ? store_any_block<true> : store_any_block<false>;
  for_each_block(std::ssize(values), [&](std::int64_t begin, std::int64_t size, std::int64_t i) {
    store(values.data() + begin, codes + begin, powers + i, size, nullptr, 0);
  });
}

void decode_state(std::span<const std::uint8_t> codes, const std::uint8_t* powers, bool is_signed,
                  float* values) {
  const IeeeEnvironment ieee;
  const auto load = is_signed ? load_any_block<true> : load_any_block<false>;
  for_each_block(std::ssize(codes), [&](std::int64_t begin, std::int64_t size, std::int64_t i) {
    load(codes.data() + begin, {powers[i]}, values + begin, size);
  });
}

}  // namespace fusestep::cpu
