#include "cpu/outer_norms.h"

#include <algorithm>
#include <cmath>

#include "core/gradient_norm.h"
#include "core/reduction.h"
#include "cpu/dispatch.h"
#include "cpu/fp_environment.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_access.h"

namespace fusestep::cpu {
namespace {

// The inner products of a few rows of a matrix, in double.
class InnerProducts {
 public:
  InnerProducts(const FlatArray* array, std::int64_t first, std::int64_t count,
                std::int64_t columns)
      : kernels_(active_tier().kernels->float64),
        access_(kernels_),
        array_(array),
        first_(first),
        columns_(columns) {
    measure(count);
    if (is_finite(largest_) && largest_ >= kSmall) return;  // else squares lose digits, or are lost
    prescale_ = is_finite(largest_) ? 1 / kPrescale : kPrescale;
    measure(count);
  }

  // The length of the longest row.
  double length() const { return std::sqrt(largest_) / prescale_; }

  // As a multiple of the square of that: it cannot overflow.
  double operator()(std::int64_t a, std::int64_t b) const {
    return largest_ == 0 ? 0
                         : (a == b ? squares_[static_cast<std::size_t>(a)] : dot(a, b)) / largest_;
  }

 private:
  void measure(std::int64_t count) {
    squares_.clear();
    for (std::int64_t row = 0; row < count; ++row) squares_.push_back(dot(row, row));
    largest_ = 0;
    for (const double square : squares_)
      if (!(square <= largest_)) largest_ = square;  // or a NaN
  }

  double dot(std::int64_t a, std::int64_t b) const {
    if (!array_) return prescale_ * prescale_;  // ones
    std::vector<double> sums;
    alignas(kCacheLine) double of_a[kTileSize], of_b[kTileSize];
    for (std::int64_t column = 0; column < columns_; column += kTileSize) {
      const std::int64_t count = std::min(kTileSize, columns_ - column);
      sums.push_back(
          kernels_.dot(read(a, column, count, of_a), read(b, column, count, of_b), count));
    }
    return sum_in_groups(sums.data(), std::ssize(sums));
  }

  const double* read(std::int64_t row, std::int64_t column, std::int64_t count,
                     double* buffer) const {
    const double* const values =
        access_.read(*array_, (first_ + row) * columns_ + column, count, buffer);
    if (prescale_ == 1) return values;
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = prescale_ * values[i];
    return buffer;
  }

  static constexpr double kSmall = 0x1p-900;
  const Kernels<double>& kernels_;
  TileAccess<double> access_;
  const FlatArray* array_;
  std::int64_t first_, columns_;
  double prescale_ = 1, largest_ = 0;
  std::vector<double> squares_;
};

}  // namespace

std::vector<double> norms_of_outer(const gradients::Samples& samples, const FlatArray& error,
                                   std::int64_t rows, const FlatArray* x, std::int64_t columns) {
  std::vector<double> norms(samples.weight.size());
  parallel_for(std::ssize(samples.present), num_threads(), [&](std::int64_t i) {
    const IeeeEnvironment ieee;
    const std::int64_t sample = samples.present[static_cast<std::size_t>(i)];
    const std::int64_t count = samples.positions, first = sample * count;
    const InnerProducts of_error(&error, first, count, rows), of_x(x, first, count, columns);
    double sum = 0;
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t u = 0; u < t; ++u) sum += 2 * of_error(t, u) * of_x(t, u);
      sum += of_error(t, t) * of_x(t, t);
    }
    norms[static_cast<std::size_t>(sample)] =
        std::sqrt(sum < 0 ? 0 : sum) * of_error.length() * of_x.length();
  });
  return norms;
}

}  // namespace fusestep::cpu
