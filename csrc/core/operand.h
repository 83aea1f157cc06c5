// Where the elements of one array lie, and the piece of it that a tile covers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/annotations.h"
#include "core/blocks.h"
#include "core/dtypes.h"

namespace fusestep {

// A 2-D strided piece of an array: element (r, c) is at data + r * row_stride + c * column_stride.
// Strides are in bytes and may be zero or negative.
struct Block {
  std::byte* data;
  DType dtype;
  std::int64_t rows, columns;
  std::int64_t row_stride, column_stride;
  std::byte* powers = nullptr;  // of state in 8 bits, from that of the first element on

  FUSESTEP_HOST_DEVICE std::int64_t size() const { return rows * columns; }

  FUSESTEP_HOST_DEVICE bool contiguous() const {
    return rows == 1 && (column_stride == item_size(dtype));
  }
};

// One array a rule reads or writes: the parameter, its gradient or a piece of its state.
struct Operand {
  std::byte* data = nullptr;  // of the element at index 0 along every axis
  DType dtype = DType::float32;
  std::byte* powers = nullptr;  // of state in 8 bits: one for each block of elements

  // From that of an element on, which begins a block.
  FUSESTEP_HOST_DEVICE std::byte* powers_at(std::int64_t element) const {
    return powers ? powers + element / kBlockElements : nullptr;
  }
};

}  // namespace fusestep
