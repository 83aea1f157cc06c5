// Makes a sum of outer products piece by piece.
//
// For a few terms, a piece is made row by row where it is used. For more, it is a product of
// matrices that is limited by arithmetic: then blocks of it are summed in registers (outer_block.h)
// from packed copies of the factors, so many rows at a time that the copies pay, and so few that
// they stay in the second-level cache until they are used. An element is summed in the same order
// either way: term by term.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/tile_access.h"
#include "gradients/outer.h"
#include "gradients/samples.h"

namespace fusestep::cpu {

template <class T>
class OuterProducts {
 public:
  OuterProducts(const Kernels<T>& kernels, const gradients::Outer& outer,
                const gradients::Samples& samples)
      : kernels_(kernels), access_(kernels), outer_(outer), samples_(samples) {}

  // Elements [begin, end) are going to be read, in this order.
  void expect(std::int64_t begin, std::int64_t end) {
    expected_begin_ = begin;
    expected_end_ = end;
  }

  // A single product is a multiple of x in each row: elements up to `end` that are one, and of
  // what.
  bool is_multiple() const { return terms() == 1 && !samples_.has_noise(); }
  struct Multiple {
    T times;
    const T* x;
    std::int64_t count;
  };
  Multiple multiple(std::int64_t begin, std::int64_t end, T* buffer) const {
    const std::int64_t row = begin / outer_.columns, column = begin % outer_.columns;
    const std::int64_t count = std::min(end - begin, outer_.columns - column);
    return {factor_of(0, row), x_of(0, column, count, buffer), count};
  }

  // Those from `begin` on that have been made, or are now; or none, where that does not pay.
  struct Made {
    T* values = nullptr;
    std::int64_t count = 0;
  };
  Made made(std::int64_t begin) {
    if (!blocks_pay() || begin < expected_begin_ || begin >= expected_end_) return {};
    if (begin < made_begin_ || begin >= made_end_) make(begin - begin % kTileSize);
    return {made_ + (begin - made_begin_), made_end_ - begin};
  }

  // Where they are, or made in `buffer`.
  T* read(std::int64_t begin, std::int64_t count, T* buffer) {
    if (const Made found = made(begin); found.count >= count) return found.values;
    if (terms() == 0) std::fill_n(buffer, count, T{-0.0});
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t row = (begin + done) / outer_.columns;
      const std::int64_t column = (begin + done) % outer_.columns;
      const std::int64_t some = std::min(count - done, outer_.columns - column);
      make_row(row, column, some, buffer + done);
      done += some;
    }
    samples_.noise.add(begin, count, buffer);
    return buffer;
  }

 private:
  static constexpr std::int64_t kColumns = kOuterColumns<T>;

  std::int64_t terms() const { return std::ssize(samples_.row); }
  std::int64_t row_of_term(std::int64_t k) const {
    return samples_.row[static_cast<std::size_t>(k)];
  }
  T coefficient(std::int64_t k) const {
    return static_cast<T>(samples_.coefficient[static_cast<std::size_t>(k)]);
  }

  // The factor of a row in the k-th product, and columns of the other.
  T factor_of(std::int64_t k, std::int64_t row) const {
    T error;
    error = *access_.read(outer_.error, row_of_term(k) * outer_.rows + row, 1, &error);
    return coefficient(k) * error;
  }
  const T* x_of(std::int64_t k, std::int64_t column, std::int64_t count, T* buffer) const {
    return access_.read(outer_.x, row_of_term(k) * outer_.columns + column, count, buffer);
  }

  // ---- row by row ----

  void make_row(std::int64_t row, std::int64_t column, std::int64_t count, T* sum) const {
    alignas(kCacheLine) T buffer[kAtOnce][kTileSize];
    for (std::int64_t first = 0; first < terms();) {
      const std::int64_t some = first + kAtOnce <= terms() ? kAtOnce : 1;
      std::array<const T*, kAtOnce> from{};
      std::array<T, kAtOnce> times{};
      for (std::int64_t i = 0; i < some; ++i) {
        times[static_cast<std::size_t>(i)] = factor_of(first + i, row);
        from[static_cast<std::size_t>(i)] = x_of(first + i, column, count, buffer[i]);
      }
      kernels_.add_products(from.data(), times.data(), static_cast<int>(some), first == 0, sum,
                            count);
      first += some;
    }
  }

  // ---- block by block ----

  // Copies are worth their while from so many terms on; or where rows are so short that going from
  // one to the next is what takes the time.
  static constexpr std::int64_t kTermsForBlocks = 5, kShortRow = 256;
  bool blocks_pay() const {
    return terms() >= kTermsForBlocks || (terms() > 0 && outer_.columns < kShortRow);
  }

  // Elements that are made at a time: at least a few blocks of whole rows, if these are not huge.
  static constexpr std::int64_t kMadeAtOnce = 64 * kTileSize, kMostMadeAtOnce = 256 * kTileSize;
  static constexpr std::int64_t kRowsForPacking = 32, kMostRows = 512;
  std::int64_t made_at_once() const {
    const auto whole_tiles = [&](std::int64_t rows) {
      return std::max(kTileSize, rows * outer_.columns / kTileSize * kTileSize);
    };
    const std::int64_t elements =
        std::clamp(whole_tiles(kRowsForPacking), kMadeAtOnce, kMostMadeAtOnce);
    return std::min(elements, whole_tiles(kMostRows));
  }

  // Terms whose packed factors stay in the first-level cache while they are used.
  static constexpr std::int64_t kTermsAtOnce = 128;

  void make(std::int64_t begin) {
    made_begin_ = begin;
    made_end_ = std::min(expected_end_, begin + made_at_once());
    first_row_ = made_begin_ / outer_.columns;
    row_blocks_ = ceil_div(ceil_div(made_end_, outer_.columns) - first_row_, kOuterRows);
    allocate();
    for (std::int64_t first = 0; first < terms(); first += kTermsAtOnce) {
      const std::int64_t some = std::min(kTermsAtOnce, terms() - first);
      pack_errors(first, some);
      for (std::int64_t column = 0; column < outer_.columns; column += kColumns) {
        const T* const x = packed_x(first, some, column);
        for (std::int64_t block = 0; block < row_blocks_; ++block)
          add_block(block, column, x, some, first == 0);
      }
    }
    samples_.noise.add(made_begin_, made_end_ - made_begin_, made_);
  }

  void allocate() {
    const std::int64_t x = keeps_x() ? size_of_x() : kTermsAtOnce * kColumns;
    const std::int64_t errors = row_blocks_ * kOuterRows;
    const std::int64_t size = made_at_once() + x + errors * (kTermsAtOnce + 1);
    if (size > allocated_) {
      memory_ = std::make_unique_for_overwrite<std::byte[]>(
          static_cast<std::size_t>(size) * sizeof(T) + kCacheLine);
      allocated_ = size;
      has_x_ = false;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    x_ = reinterpret_cast<T*>(ceil_div(static_cast<std::int64_t>(address), kCacheLine) *
                              static_cast<std::int64_t>(kCacheLine));
    made_ = x_ + x;
    row_of_errors_ = made_ + made_at_once();
    errors_ = row_of_errors_ + errors;
  }

  // For each block of rows, term by term: its errors, times the coefficient. Rows that are not
  // there have none.
  void pack_errors(std::int64_t first, std::int64_t count) {
    const std::int64_t padded = row_blocks_ * kOuterRows;
    const std::int64_t rows = std::min(padded, outer_.rows - first_row_);
    for (std::int64_t k = 0; k < count; ++k) {
      std::fill(row_of_errors_ + rows, row_of_errors_ + padded, T{0});
      const T times = coefficient(first + k);
      read_long(outer_.error, row_of_term(first + k) * outer_.rows + first_row_, rows,
                row_of_errors_);
      for (std::int64_t row = 0; row < padded; ++row) {
        const std::int64_t block = row / kOuterRows, place = row % kOuterRows;
        errors_[(block * count + k) * kOuterRows + place] = times * row_of_errors_[row];
      }
    }
  }

  void read_long(const FlatArray& array, std::int64_t begin, std::int64_t count, T* to) const {
    for (std::int64_t done = 0; done < count; done += kTileSize) {
      const std::int64_t some = std::min(kTileSize, count - done);
      const T* const from = access_.read(array, begin + done, some, to + done);
      if (from != to + done) std::copy_n(from, some, to + done);
    }
  }

  // A small x is packed once, for all that is made of it; else again and again.
  static constexpr std::int64_t kMostKept = 1 << 16;
  std::int64_t size_of_x() const { return terms() * ceil_div(outer_.columns, kColumns) * kColumns; }
  bool keeps_x() const { return terms() <= kTermsAtOnce && size_of_x() <= kMostKept; }

  const T* packed_x(std::int64_t first, std::int64_t count, std::int64_t column) {
    T* const to = keeps_x() ? x_ + column * count : x_;
    const bool is_last = column + kColumns >= outer_.columns;
    if (!has_x_) pack_x(first, count, column, to);
    has_x_ = has_x_ || (keeps_x() && is_last);
    return to;
  }

  void pack_x(std::int64_t first, std::int64_t count, std::int64_t column, T* to) const {
    const std::int64_t size = std::min(kColumns, outer_.columns - column);
    for (std::int64_t k = 0; k < count; ++k, to += kColumns) {
      const T* const from = x_of(first + k, column, size, to);
      if (from != to) std::copy_n(from, size, to);
      std::fill(to + size, to + kColumns, T{0});
    }
  }

  void add_block(std::int64_t block, std::int64_t column, const T* x, std::int64_t count,
                 bool begins) {
    const T* const errors = errors_ + block * count * kOuterRows;
    const std::int64_t row = first_row_ + block * kOuterRows;
    const std::int64_t begin = row * outer_.columns + column;
    const std::int64_t last = begin + (kOuterRows - 1) * outer_.columns + kColumns;
    const bool is_whole = column + kColumns <= outer_.columns;
    if (is_whole && made_begin_ <= begin && last <= made_end_)
      return kernels_.add_outer(errors, x, count, begins, made_ + (begin - made_begin_),
                                outer_.columns);
    alignas(kCacheLine) T sums[kOuterRows * kColumns];
    if (!begins)
      each_made_row_of(row, column,
                       [&](std::int64_t i, T* made, std::int64_t from, std::int64_t n) {
                         std::copy_n(made, n, sums + i * kColumns + from);
                       });
    kernels_.add_outer(errors, x, count, begins, sums, kColumns);
    each_made_row_of(row, column, [&](std::int64_t i, T* made, std::int64_t from, std::int64_t n) {
      std::copy_n(sums + i * kColumns + from, n, made);
    });
  }

  // Calls visit(row of the block, its elements that are being made, number of the first, count).
  template <class Visit>
  void each_made_row_of(std::int64_t row, std::int64_t column, Visit visit) const {
    const std::int64_t columns = std::min(kColumns, outer_.columns - column);
    for (std::int64_t i = 0; i < kOuterRows; ++i) {
      const std::int64_t start = (row + i) * outer_.columns + column;
      const std::int64_t begin = std::max(start, made_begin_);
      const std::int64_t end = std::min(start + columns, made_end_);
      if (begin < end) visit(i, made_ + (begin - made_begin_), begin - start, end - begin);
    }
  }

  static constexpr std::int64_t kAtOnce = 4;
  const Kernels<T>& kernels_;
  TileAccess<T> access_;
  const gradients::Outer& outer_;
  const gradients::Samples& samples_;
  std::int64_t expected_begin_ = 0, expected_end_ = 0;

  // What has been made of it, and from what.
  std::int64_t made_begin_ = 0, made_end_ = 0, first_row_ = 0, row_blocks_ = 0;
  std::unique_ptr<std::byte[]> memory_;
  std::int64_t allocated_ = 0;
  bool has_x_ = false;  // all of it is packed
  T *made_ = nullptr, *x_ = nullptr, *errors_ = nullptr, *row_of_errors_ = nullptr;
};

}  // namespace fusestep::cpu
