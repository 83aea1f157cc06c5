#include "rules/block_progress.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace fusestep::rules {
namespace {

constexpr std::uint32_t kMostSteps = std::numeric_limits<std::uint32_t>::max();

std::uint32_t counted(std::int64_t steps) {
  return static_cast<std::uint32_t>(std::min(steps, std::int64_t{kMostSteps}));
}

// Each value as often as its block has smaller ones in it.
template <class Value>
std::vector<Value> repeated(const std::vector<Value>& values, std::int64_t old_block,
                            std::int64_t block, std::int64_t count) {
  std::vector<Value> result(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    result[static_cast<std::size_t>(i)] = values[static_cast<std::size_t>(i * block / old_block)];
  return result;
}

}  // namespace

void BlockProgress::split(std::int64_t size, std::int64_t block, const Progress& progress,
                          const AnyRule& rule) {
  const auto count = static_cast<std::size_t>(ceil_div(size, block));
  const bool has_products = rule.advance({}).momentum_product != 1;
  restore(size, block, std::vector(count, counted(progress.step)),
          std::vector(has_products ? count : 0, progress.momentum_product));
}

void BlockProgress::restore(std::int64_t size, std::int64_t block, std::vector<std::uint32_t> steps,
                            std::vector<double> products) {
  size_ = size;
  block_ = std::min(block, size);
  steps_ = std::move(steps);
  products_ = std::move(products);
}

void BlockProgress::refine(std::int64_t block) {
  if (block >= size_) return;
  divide(block_ >= size_ ? block : std::gcd(block_, block));
}

void BlockProgress::divide(std::int64_t block) {
  if (block == block_) return;
  const std::int64_t count = ceil_div(size_, block);
  steps_ = repeated(steps_, block_, block, count);
  if (!products_.empty()) products_ = repeated(products_, block_, block, count);
  block_ = block;
}

void BlockProgress::resize(std::int64_t size) {
  divide(std::gcd(block_, size_));
  size_ = size;
  steps_.resize(static_cast<std::size_t>(ceil_div(size, block_)), 0);
  if (!products_.empty()) products_.resize(steps_.size(), 1.0);
}

std::int64_t BlockProgress::end_of_equal(std::int64_t element, std::int64_t limit) const {
  if (is_plain()) return end_of_equal_plain(element, limit);
  const std::int64_t first = block_of(element);
  std::int64_t block = first + 1;
  while (block * block_ < limit && of_block(block) == of_block(first)) ++block;
  return std::min(limit, block * block_);
}

// Nearly always all are equal, which a loop without a branch finds out in a tenth of the time.
std::int64_t BlockProgress::end_of_equal_plain(std::int64_t element, std::int64_t limit) const {
  const std::uint32_t* const steps = steps_.data() + element;
  const std::int64_t count = limit - element;
  std::uint32_t difference = 0;
  for (std::int64_t i = 0; i < count; ++i) difference |= steps[i] ^ steps[0];
  if (difference == 0) return limit;
  std::int64_t end = 1;
  while (steps[end] == steps[0]) ++end;
  return element + end;
}

bool BlockProgress::is_equal(std::int64_t first, const TileBits& bits) const {
  if (is_plain()) return is_equal_plain(first, bits);
  const Progress expected = of(first + bits.first_set());
  bool is_equal = true;
  bits.for_each_run([&](std::int64_t begin, std::int64_t end) {
    is_equal = is_equal && of(first + begin) == expected &&
               end_of_equal(first + begin, first + end) == first + end;
  });
  return is_equal;
}

bool BlockProgress::is_equal_plain(std::int64_t first, const TileBits& bits) const {
  const auto is_meant = bits.bytes();
  const std::uint32_t* const steps = steps_.data() + first;
  const std::uint32_t expected = steps[bits.first_set()];
  const std::int64_t size = std::min(kTileSize, size_ - first);
  std::uint32_t difference = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t all_or_none = -std::uint32_t{is_meant[static_cast<std::size_t>(i)] != 0};
    difference |= (steps[i] ^ expected) & all_or_none;
  }
  return difference == 0;
}

void BlockProgress::advance(const AnyRule& rule, std::int64_t first, const TileBits& moved) {
  if (is_plain()) return advance_plain(first, moved);
  // Blocks that have come as far as the one before them, nearly all, need not ask the rule again.
  Progress before, after = rule.advance(before);
  moved.for_each_run([&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = ceil_div(first + begin, block_); block * block_ < first + end;
         ++block) {
      const auto i = static_cast<std::size_t>(block);
      if (!products_.empty()) {
        const Progress present = of_block(block);
        if (present != before) after = rule.advance(before = present);
        products_[i] = after.momentum_product;
      }
      steps_[i] += steps_[i] != kMostSteps;
    }
  });
}

void BlockProgress::advance_plain(std::int64_t first, const TileBits& moved) {
  const auto is_moved = moved.bytes();
  std::uint32_t* const steps = steps_.data() + first;
  const std::int64_t size = std::min(kTileSize, size_ - first);
  for (std::int64_t i = 0; i < size; ++i)
    steps[i] += (is_moved[static_cast<std::size_t>(i)] != 0) & (steps[i] != kMostSteps);
}

}  // namespace fusestep::rules
