// Reads the operands of a part of a parameter, in the type a rule computes in.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/tile_bits.h"
#include "cpu/kernels.h"
#include "cpu/tile_access.h"
#include "selections/part.h"

namespace fusestep::cpu {

// Elements are meant by their number in the parameter.
template <class T>
class PartReader {
 public:
  PartReader(const Kernels<T>& kernels, const selections::Part& part)
      : kernels_(kernels), access_(kernels), part_(part) {}

  // Where they are, or copied to `buffer`.
  T* read(int operand, std::int64_t begin, std::int64_t count, T* buffer) const {
    if (operand == kGradient && part_.rows) return add_up_rows(begin, count, buffer);
    if (operand == kGradient && part_.samples) return add_up_samples(begin, count, buffer);
    return read(part_.operand[static_cast<std::size_t>(operand)], begin, count, buffer);
  }

  // The gradient of what moves in the i-th tile, and 0 for the rest of it. Returns how many they
  // are.
  std::int64_t moved_gradient(std::int64_t i, T* values) const {
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
  T* read(const FlatArray& array, std::int64_t begin, std::int64_t count, T* buffer) const {
    if (array.stretch(begin) >= count) return access_.read(array.block(begin, count), buffer);
    array.for_each_stretch(begin, count, [&](const Block& block, std::int64_t offset) {
      access_.load(block, buffer + offset);
    });
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
      const T* const source = read(part_.operand[kGradient],
                                   rows.source(i, k) * part_.row_size + column, count, buffer);
      for (std::int64_t j = 0; j < count; ++j) sum[j] = k == 0 ? source[j] : sum[j] + source[j];
    }
  }

  // In the order of gradients/sum_of_samples.h.
  T* add_up_samples(std::int64_t begin, std::int64_t count, T* sum) const {
    const gradients::Samples& samples = *part_.samples;
    alignas(kCacheLine) T buffer[kFour][kTileSize];
    std::fill_n(sum, count, gradients::kNoSamples<T>);
    const std::size_t present = samples.present.size();
    for (std::size_t first = 0; first < present;) {
      const std::size_t some = first + kFour <= present ? kFour : 1;
      std::array<const T*, kFour> from{};
      std::array<T, kFour> times{};
      for (std::size_t k = 0; k < some; ++k) {
        from[k] = read(part_.operand[kGradient], samples.present[first + k] * part_.size + begin,
                       count, buffer[k]);
        times[k] = static_cast<T>(samples.coefficient[first + k]);
      }
      kernels_.add_products(from.data(), times.data(), static_cast<int>(some), sum, count);
      first += some;
    }
    if (samples.has_noise())
      for (std::int64_t i = 0; i < count; ++i) sum[i] += static_cast<T>(samples.noise(begin + i));
    return sum;
  }

  static constexpr std::size_t kFour = gradients::kSamplesAtOnce;
  const Kernels<T>& kernels_;
  TileAccess<T> access_;
  const selections::Part& part_;
};

}  // namespace fusestep::cpu
