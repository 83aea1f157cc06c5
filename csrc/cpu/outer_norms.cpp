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

// A few rows of a matrix, in double: how long each is, and the angles between them.
class Rows {
 public:
  Rows(const FlatArray* array, std::int64_t first, std::int64_t count, std::int64_t columns)
      : kernels_(active_tier().kernels->float64),
        access_(kernels_),
        array_(array),
        first_(first),
        columns_(columns) {
    for (std::int64_t row = 0; row < count; ++row) rows_.push_back(measured(row));
  }

  double length(std::int64_t row) const { return at(row).length / at(row).prescale; }

  // From 1 to -1.
  double cosine(std::int64_t a, std::int64_t b) const {
    if (a == b) return 1;
    const double lengths = at(a).length * at(b).length;
    return lengths == 0 ? 0 : dot(a, at(a).prescale, b, at(b).prescale) / lengths;
  }

 private:
  // Prescaled where squares would overflow, or lose digits.
  struct Row {
    double prescale, length;
  };
  const Row& at(std::int64_t row) const { return rows_[static_cast<std::size_t>(row)]; }

  Row measured(std::int64_t row) const {
    constexpr double kSmall = 0x1p-900;
    const double square = dot(row, 1, row, 1);
    if (is_finite(square) && square >= kSmall) return {1, std::sqrt(square)};
    const double prescale = is_finite(square) ? 1 / kPrescale : kPrescale;
    return {prescale, std::sqrt(dot(row, prescale, row, prescale))};
  }

  double dot(std::int64_t a, double prescale_a, std::int64_t b, double prescale_b) const {
    if (!array_) return prescale_a * prescale_b;  // ones
    std::vector<double> sums;
    alignas(kCacheLine) double of_a[kTileSize], of_b[kTileSize];
    for (std::int64_t column = 0; column < columns_; column += kTileSize) {
      const std::int64_t count = std::min(kTileSize, columns_ - column);
      sums.push_back(kernels_.dot(read(a, column, count, prescale_a, of_a),
                                  read(b, column, count, prescale_b, of_b), count));
    }
    return sum_in_groups(sums.data(), std::ssize(sums));
  }

  const double* read(std::int64_t row, std::int64_t column, std::int64_t count, double prescale,
                     double* buffer) const {
    const double* const values =
        access_.read(*array_, (first_ + row) * columns_ + column, count, buffer);
    if (prescale == 1) return values;
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = prescale * values[i];
    return buffer;
  }

  const Kernels<double>& kernels_;
  TileAccess<double> access_;
  const FlatArray* array_;
  std::int64_t first_, columns_;
  std::vector<Row> rows_;
};

// Of the sum of so many products. Where they nearly cancel, what is left is mostly what rounding
// makes of them, in the step's own sum, too: as much as that can be is added, since this is a
// bound.
double norm_of_sum(const Rows& error, const Rows& x, std::int64_t count, double rounding) {
  std::vector<double> lengths;
  double longest = 0, all = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    lengths.push_back(error.length(t) * x.length(t));
    if (!(lengths.back() <= longest)) longest = lengths.back();  // or a NaN
  }
  if (longest == 0 || !is_finite(longest) || count == 1) return longest;
  double square = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    const double of_t = lengths[static_cast<std::size_t>(t)] / longest;
    all += of_t;
    square += of_t * of_t;
    for (std::int64_t u = 0; u < t; ++u)
      square += 2 * of_t * (lengths[static_cast<std::size_t>(u)] / longest) * error.cosine(t, u) *
                x.cosine(t, u);
  }
  const double most_rounding = static_cast<double>(count + 2) * rounding * all;
  // In double, the square has been rounded, too.
  const double least = std::sqrt(static_cast<double>(count) * 0x1p-50) * all;
  const bool is_lost = square < least * least;
  return longest * ((is_lost ? least : std::sqrt(square)) + most_rounding);
}

}  // namespace

std::vector<double> norms_of_outer(const gradients::Samples& samples, DType compute,
                                   const FlatArray& error, std::int64_t rows, const FlatArray* x,
                                   std::int64_t columns) {
  const double rounding = compute == DType::float64 ? 0x1p-52 : 0x1p-23;
  std::vector<double> norms(samples.weight.size());
  parallel_for(std::ssize(samples.present), num_threads(), [&](std::int64_t i) {
    const IeeeEnvironment ieee;
    const std::int64_t sample = samples.present[static_cast<std::size_t>(i)];
    const std::int64_t count = samples.positions, first = sample * count;
    const Rows of_error(&error, first, count, rows), of_x(x, first, count, columns);
    norms[static_cast<std::size_t>(sample)] = norm_of_sum(of_error, of_x, count, rounding);
  });
  return norms;
}

}  // namespace fusestep::cpu
