#include "gradients/rows.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <string>
#include <utility>

#include "core/errors.h"

namespace fusestep::gradients {
namespace {

using Numbers = std::span<const std::int64_t>;

void check_range(Numbers numbers, std::int64_t table_rows) {
  const auto is_outside = [=](std::int64_t row) { return row < 0 || row >= table_rows; };
  const auto found = std::ranges::find_if(numbers, is_outside);
  if (found == numbers.end()) return;
  throw IndexError("row " + std::to_string(*found) + " (at position " +
                   std::to_string(found - numbers.begin()) + " of the indices); expected 0 to " +
                   std::to_string(table_rows - 1));
}

// The positions of the numbers, sorted by number; equal ones in the order in which they came.
// Least significant digit first: a few passes over short arrays, where comparing would take a dozen
// branches for each of them that nothing predicts.
std::vector<std::int64_t> sorted_positions(Numbers numbers, std::int64_t table_rows) {
  constexpr int kDigitBits = 11;
  constexpr std::uint64_t kDigits = 1 << kDigitBits;
  std::vector<std::int64_t> positions(numbers.size());
  std::iota(positions.begin(), positions.end(), 0);
  if (numbers.size() < kDigits / 8) {
    std::ranges::stable_sort(positions, {}, [&](std::int64_t at) { return numbers[at]; });
    return positions;
  }
  std::vector<std::int64_t> sorted(numbers.size());
  const int bits = std::bit_width(static_cast<std::uint64_t>(table_rows - 1));
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    const auto digit = [&](std::int64_t at) {
      return (static_cast<std::uint64_t>(numbers[static_cast<std::size_t>(at)]) >> shift) % kDigits;
    };
    std::array<std::size_t, kDigits> next{};
    for (const std::int64_t at : positions) ++next[digit(at)];
    std::exclusive_scan(next.begin(), next.end(), next.begin(), std::size_t{0});
    for (const std::int64_t at : positions) sorted[next[digit(at)]++] = at;
    positions.swap(sorted);
  }
  return positions;
}

}  // namespace

void Rows::plan(Numbers numbers, std::int64_t table_rows) {
  check_range(numbers, table_rows);
  const bool ascend =
      std::ranges::adjacent_find(numbers, std::ranges::greater_equal{}) == numbers.end();
  source_.clear();
  first_.clear();
  state_row_.clear();
  number_.clear();
  written_.clear();
  is_in_place_ = false;
  if (ascend) {
    row_.assign(numbers.begin(), numbers.end());
  } else {
    source_ = sorted_positions(numbers, table_rows);
    row_.clear();
    for (std::size_t i = 0; i < source_.size(); ++i) {
      const std::int64_t row = numbers[static_cast<std::size_t>(source_[i])];
      if (!row_.empty() && row_.back() == row) continue;
      row_.push_back(row);
      first_.push_back(static_cast<std::int64_t>(i));
    }
    first_.push_back(std::ssize(source_));
  }
  count_ = std::ssize(row_);
}

void Rows::plan_in_place(std::vector<std::int64_t> rows) {
  plan_sums(std::move(rows), {}, {});
  is_in_place_ = true;
}

void Rows::plan_pairs(std::vector<std::int64_t> rows, std::vector<std::int64_t> sources) {
  std::vector<std::int64_t> first(rows.size() + 1);
  std::iota(first.begin(), first.end(), 0);
  plan_sums(std::move(rows), std::move(first), std::move(sources));
}

void Rows::plan_sums(std::vector<std::int64_t> rows, std::vector<std::int64_t> first,
                     std::vector<std::int64_t> sources) {
  is_in_place_ = false;
  row_ = std::move(rows);
  state_row_.clear();
  number_.clear();
  written_.clear();
  first_ = std::move(first);
  source_ = std::move(sources);
  count_ = std::ssize(row_);
}

void Rows::plan_state(std::vector<std::int64_t> rows) {
  state_row_ = std::move(rows);
  if (state_row_ == row_) state_row_.clear();
}

void Rows::plan_all(std::int64_t table_rows) {
  is_in_place_ = false;
  row_.clear();
  state_row_.clear();
  number_.clear();
  written_.clear();
  first_.clear();
  source_.clear();
  count_ = table_rows;
}

}  // namespace fusestep::gradients
