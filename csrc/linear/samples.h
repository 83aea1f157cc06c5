// The samples that a linear model is given: a matrix, dense of any strides or in compressed rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fusestep::linear {

// Whole numbers as SciPy stores them: of 4 or 8 bytes.
struct Indices {
  const void* data = nullptr;
  bool is_wide = false;

  std::int64_t operator[](std::int64_t i) const {
    return is_wide ? static_cast<const std::int64_t*>(data)[i]
                   : static_cast<const std::int32_t*>(data)[i];
  }

  void copy(std::int64_t begin, std::int64_t count, std::int64_t* to) const {
    if (is_wide)
      std::copy_n(static_cast<const std::int64_t*>(data) + begin, count, to);
    else
      std::copy_n(static_cast<const std::int32_t*>(data) + begin, count, to);
  }
};

template <class T>
struct Samples {
  std::int64_t count = 0, features = 0;

  // Dense: `values` at any strides, in bytes.
  const std::byte* values = nullptr;
  std::int64_t row_stride = 0, column_stride = 0;

  // Compressed rows: `values` one after another; row i has those from starts[i] to starts[i + 1],
  // in these columns, which ascend.
  bool is_sparse = false;
  Indices starts{}, columns{};

  const T* stored() const { return reinterpret_cast<const T*>(values); }

  // Of dense samples, which need not be aligned.
  T at(std::int64_t row, std::int64_t column) const {
    T x;
    memcpy(&x, values + row * row_stride + column * column_stride, sizeof x);
    return x;
  }
};

}  // namespace fusestep::linear
