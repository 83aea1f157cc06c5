// A gradient that is zero but for some rows: of an embedding table, say, of which a batch has used
// a few.
//
// It comes as a list of row numbers, in any order, and one row of values for each. The values of a
// row that is listed several times are added up, in the order of the list, so that their sum has
// the same bits on any number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "core/tiling.h"

namespace fusestep::gradients {

// Rows of a table are numbered along its first axis.
class Rows {
 public:
  // Throws IndexError, and leaves what was planned before, for a number that is not a row.
  void plan(std::span<const std::int64_t> numbers, std::int64_t table_rows);

  std::int64_t count() const { return static_cast<std::int64_t>(row_.size()); }

  // The i-th row that moves: they ascend.
  std::int64_t row(std::int64_t i) const { return row_[static_cast<std::size_t>(i)]; }

  // Which rows of the values are added up for it.
  std::span<const std::int64_t> sources(std::int64_t i) const {
    const auto first = static_cast<std::size_t>(first_[static_cast<std::size_t>(i)]);
    const auto last = static_cast<std::size_t>(first_[static_cast<std::size_t>(i) + 1]);
    return std::span(source_).subspan(first, last - first);
  }

  // From one row to the next, in bytes, for each operand; those of the gradient are of the values.
  std::array<std::int64_t, kMaxOperands> stride{};

 private:
  std::vector<std::int64_t> row_;
  std::vector<std::int64_t> first_;   // where the sources of each row begin, and the end
  std::vector<std::int64_t> source_;  // in the order of the rows
};

}  // namespace fusestep::gradients
