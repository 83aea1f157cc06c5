// Reads the operands of a part of a parameter, in the type a rule computes in.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "core/tile_bits.h"
#include "cpu/kernels.h"
#include "cpu/outer.h"
#include "cpu/tile_access.h"
#include "selections/part.h"

namespace fusestep::cpu {

// Elements are meant by their number in the parameter.
template <class T>
class PartReader {
 public:
  PartReader(const Kernels<T>& kernels, const selections::Part& part)
      : kernels_(kernels), access_(kernels), part_(part) {
    if (part.outer) outer_.emplace(kernels, *part.outer, *part.samples);
  }

  // Gradients of the i-th tile that moves, and of those after it up to `last`, are going to be
  // read, in this order.
  void expect(std::int64_t i, std::int64_t last) {
    if (!outer_ || i < expected_) return;
    expected_ = i + 1;
    while (expected_ < last && part_.tile(expected_) == part_.tile(expected_ - 1) + 1) ++expected_;
    const std::int64_t end = part_.tile(expected_ - 1);
    outer_->expect(part_.tile(i) * kTileSize, end * kTileSize + part_.size_of(end));
  }

  // Some of the gradients from `begin` on, which are made of samples; multiplied by a factor.
  struct Piece {
    gradients::Dense<T> gradient;
    std::int64_t count;
  };
  // At most, if they are made in the buffer. The sum of samples is the longer, the quicker: memory
  // is read in longer stretches (64 x 1M: 9.1 ms by 32 KB, 8.3 ms by 128 KB).
  static constexpr std::int64_t kPiece = 32768 / sizeof(T), kLongPiece = 4 * kPiece;
  bool makes_long_pieces() const { return !outer_; }

  Piece gradient(std::int64_t begin, std::int64_t end, T factor, T* buffer) {
    if (outer_ && outer_->is_multiple() && (factor == 1 || factor == -1)) {  // rounds nothing
      const auto [times, x, count] = outer_->multiple(begin, std::min(end, begin + kPiece), buffer);
      return {{x, factor * times}, count};
    }
    if (outer_)
      if (const auto [values, count] = outer_->made(begin); count > 0)
        return {{values, factor}, std::min(count, end - begin)};
    const std::int64_t count = std::min(end - begin, outer_ ? kPiece : kLongPiece);
    if (!outer_) return {{add_up_samples(begin, count, buffer), factor}, count};
    for (std::int64_t done = 0; done < count; done += kTileSize)
      read(kGradient, begin + done, std::min(kTileSize, count - done), buffer + done);
    return {{buffer, factor}, count};
  }

  // Where they are, or copied to `buffer`.
  T* read(int operand, std::int64_t begin, std::int64_t count, T* buffer) {
    if (operand == kGradient && part_.rows) return add_up_rows(begin, count, buffer);
    if (operand == kGradient && outer_) return outer_->read(begin, count, buffer);
    if (operand == kGradient && part_.samples) return add_up_samples(begin, count, buffer);
    if (operand == kParameter && part_.lower_half) return join(begin, count, buffer);
    return access_.read(array(operand), begin, count, buffer);
  }

  // The gradient of what moves in the i-th tile, and 0 for the rest of it. Returns how many they
  // are.
  std::int64_t moved_gradient(std::int64_t i, T* values) {
    const std::int64_t tile = part_.tile(i);
    const std::int64_t size = part_.size_of(tile);
    std::fill_n(values, size, T{0});
    part_.moved(i).for_each_run([&](std::int64_t begin, std::int64_t end) {
      const T* const found = read(kGradient, tile * kTileSize + begin, end - begin, values + begin);
      if (found != values + begin) std::copy_n(found, end - begin, values + begin);
    });
    return size;
  }

 private:
  const FlatArray& array(int operand) const {
    return part_.operand[static_cast<std::size_t>(operand)];
  }

  // Of a parameter that is kept in two halves.
  T* join(std::int64_t begin, std::int64_t count, T* buffer) const {
    const FlatArray &upper = array(kParameter), &lower = array(part_.lower_half);
    for (std::int64_t done = 0, some; done < count; done += some) {
      const std::int64_t at = begin + done;
      some = std::min({count - done, upper.stretch(at), lower.stretch(at)});
      access_.join(upper.block(at, some), lower.block(at, some), buffer + done);
    }
    return buffer;
  }

  T* add_up_rows(std::int64_t begin, std::int64_t count, T* buffer) const {
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t row = (begin + done) / part_.row_size;
      const std::int64_t column = (begin + done) % part_.row_size;
      const std::int64_t some = std::min(count - done, part_.row_size - column);
      add_up_row(row, column, some, buffer + done);
      done += some;
    }
    return buffer;
  }

  // Elements of one row, from `column` on: the sum of its sources; 0 where the row is not listed.
  void add_up_row(std::int64_t row, std::int64_t column, std::int64_t count, T* sum) const {
    const gradients::Rows& rows = *part_.rows;
    std::fill_n(sum, count, T{0});
    const std::int64_t i = rows.find(row);
    if (i == rows.count()) return;
    alignas(kCacheLine) T buffer[kTileSize];
    for (std::int64_t k = 0; k < rows.sources(i); ++k) {
      const T* const source = access_.read(
          part_.operand[kGradient], rows.source(i, k) * part_.row_size + column, count, buffer);
      for (std::int64_t j = 0; j < count; ++j) sum[j] = k == 0 ? source[j] : sum[j] + source[j];
    }
  }

  // In the order of gradients/sum_of_samples.h. Of each sample as much is read at a stretch as
  // there is to do: that is how memory is quickest.
  T* add_up_samples(std::int64_t begin, std::int64_t count, T* sum) const {
    const gradients::Samples& samples = *part_.samples;
    const std::size_t rows = samples.row.size();
    if (rows == 0) std::fill_n(sum, count, gradients::kNoSamples<T>);
    for (std::size_t first = 0, some; first < rows; first += some) {
      some = first + kFour <= rows ? kFour : 1;
      for (std::int64_t done = 0; done < count; done += kTileSize)
        add_samples(first, some, begin + done, std::min(kTileSize, count - done), sum + done);
    }
    samples.noise.add(begin, count, sum);
    return sum;
  }

  void add_samples(std::size_t first, std::size_t some, std::int64_t begin, std::int64_t count,
                   T* sum) const {
    const gradients::Samples& samples = *part_.samples;
    alignas(kCacheLine) T buffer[kFour][kTileSize];
    std::array<const T*, kFour> from{};
    std::array<T, kFour> times{};
    for (std::size_t k = 0; k < some; ++k) {
      from[k] = access_.read(part_.operand[kGradient], samples.row[first + k] * part_.size + begin,
                             count, buffer[k]);
      times[k] = static_cast<T>(samples.coefficient[first + k]);
    }
    kernels_.add_products(from.data(), times.data(), static_cast<int>(some), first == 0, sum,
                          count);
  }

  static constexpr std::size_t kFour = gradients::kSamplesAtOnce;
  const Kernels<T>& kernels_;
  TileAccess<T> access_;
  const selections::Part& part_;
  std::optional<OuterProducts<T>> outer_;
  std::int64_t expected_ = 0;  // tiles before this one have been announced
};

}  // namespace fusestep::cpu
