// A gradient that is zero but for some rows: of an embedding table, say, of which a batch has used
// a few.
//
// It comes as a list of row numbers, in any order, and one row of values for each. The values of a
// row that is listed several times are added up, in the order of the list, so that their sum has
// the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/tiling.h"

namespace fusestep::gradients {

// Rows of a table are numbered along its first axis.
class Rows {
 public:
  // Throws IndexError, and leaves what was planned before, for a number that is not a row.
  void plan(std::span<const std::int64_t> numbers, std::int64_t table_rows);

  // These rows, which ascend; the values of each are the row of the same number.
  void plan_in_place(std::vector<std::int64_t> rows);

  // The same where the values of each are the row that stands at its place in `sources`.
  void plan_pairs(std::vector<std::int64_t> rows, std::vector<std::int64_t> sources);

  // The same where the values of several rows are added up: those of the i-th row stand at
  // first[i] and up to first[i + 1] of `sources`.
  void plan_sums(std::vector<std::int64_t> rows, std::vector<std::int64_t> first,
                 std::vector<std::int64_t> sources);

  // After either: the state of each row stands in another one than its value does.
  void plan_state(std::vector<std::int64_t> rows);

  // Likewise: the number of each row's first element, where rows do not go on as in the table.
  void plan_numbers(std::vector<std::int64_t> numbers) { number_ = std::move(numbers); }

  // Likewise: which elements of each block of each row change their value (selections/part.h).
  void plan_written(std::vector<std::int64_t> words) { written_ = std::move(words); }

  // Every row, each with its own values: a dense gradient.
  void plan_all(std::int64_t table_rows);

  // Leaves out rows for which keeps(row) is false.
  template <class Keeps>
  void filter(Keeps keeps);

  std::int64_t count() const { return count_; }

  // The i-th row that moves: they ascend.
  std::int64_t row(std::int64_t i) const {
    return row_.empty() ? i : row_[static_cast<std::size_t>(i)];
  }

  // Which of them is this row of the table; count() where it is not listed.
  std::int64_t find(std::int64_t row) const {
    if (row_.empty()) return std::min(row, count_);
    const auto at = std::ranges::lower_bound(row_, row);
    return at != row_.end() && *at == row ? at - row_.begin() : count_;
  }

  // How many rows of the values are added up for it, and which is the k-th of them.
  std::int64_t sources(std::int64_t i) const {
    if (source_.empty()) return 1;
    const auto at = static_cast<std::size_t>(i);
    return first_[at + 1] - first_[at];
  }
  std::int64_t source(std::int64_t i, std::int64_t k) const {
    if (source_.empty()) return is_in_place_ ? row(i) : i;
    return source_[static_cast<std::size_t>(first_[static_cast<std::size_t>(i)] + k)];
  }

  // True where there is no list of sources, and the values of a row are that row.
  bool is_in_place() const { return is_in_place_; }

  // What is behind this, for who walks it elsewhere: rows, first sources, sources, rows of state,
  // numbers of first elements, elements that change their value.
  std::array<std::span<const std::int64_t>, 6> lists() const {
    return {row_, first_, source_, state_row_, number_, written_};
  }

  // From one row to the next, in bytes, for each operand; those of the gradient are of the values.
  std::array<std::int64_t, kMaxOperands> stride{};

 private:
  std::int64_t count_ = 0;
  std::vector<std::int64_t> row_;        // empty: all of them
  std::vector<std::int64_t> first_;      // where the sources of each row begin, and the end
  std::vector<std::int64_t> source_;     // in the order of the rows; empty: one for each, in order
  std::vector<std::int64_t> state_row_;  // empty: the rows themselves
  std::vector<std::int64_t> number_;     // empty: row after row
  std::vector<std::int64_t> written_;    // words, of a bit for each element; empty: all of them
  bool is_in_place_ = false;
};

template <class Keeps>
void Rows::filter(Keeps keeps) {
  std::vector<std::int64_t> row, first, source;
  for (std::int64_t i = 0; i < count_; ++i) {
    if (!keeps(this->row(i))) continue;
    row.push_back(this->row(i));
    first.push_back(std::ssize(source));
    for (std::int64_t k = 0; k < sources(i); ++k) source.push_back(this->source(i, k));
  }
  first.push_back(std::ssize(source));
  count_ = std::ssize(row);
  is_in_place_ = false;
  row_.swap(row);
  first_.swap(first);
  source_.swap(source);
}

}  // namespace fusestep::gradients
