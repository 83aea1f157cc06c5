#include "cpu/tile_access.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"

namespace fusestep::cpu {
namespace {

// Calls f(C++ element type) for a dtype.
template <class Function>
void with_element(DType dtype, Function f) {
  switch (dtype) {
    case DType::float32: return f(Element<DType::float32>{});
    case DType::float64: return f(Element<DType::float64>{});
    case DType::float16: return f(Element<DType::float16>{});
    case DType::bfloat16: return f(Element<DType::bfloat16>{});
    default: return;  // no floats
  }
}

// Calls f(address, index in the buffer) for every element, along the shorter stride first: the
// array is in slow memory, the buffer in the first-level cache.
template <class Function>
void for_each_element(const Block& block, Function f) {
  const bool rows_inside = std::abs(block.row_stride) < std::abs(block.column_stride);
  const std::int64_t outer = rows_inside ? block.columns : block.rows;
  const std::int64_t inner = rows_inside ? block.rows : block.columns;
  const std::int64_t outer_stride = rows_inside ? block.column_stride : block.row_stride;
  const std::int64_t inner_stride = rows_inside ? block.row_stride : block.column_stride;
  const std::int64_t outer_step = rows_inside ? 1 : block.columns;
  const std::int64_t inner_step = rows_inside ? block.columns : 1;
  for (std::int64_t i = 0; i < outer; ++i)
    for (std::int64_t j = 0; j < inner; ++j)
      f(block.data + i * outer_stride + j * inner_stride, i * outer_step + j * inner_step);
}

// The same for elements of two blocks of one shape.
template <class Function>
void for_each_pair(const Block& a, const Block& b, Function f) {
  for (std::int64_t r = 0; r < a.rows; ++r)
    for (std::int64_t c = 0; c < a.columns; ++c)
      f(a.data + r * a.row_stride + c * a.column_stride,
        b.data + r * b.row_stride + c * b.column_stride, r * a.columns + c);
}

bool has_contiguous_rows(const Block& block) {
  return block.column_stride == item_size(block.dtype);
}

}  // namespace

template <class T>
void TileAccess<T>::load(const Block& block, T* buffer) const {
  if (is_in_blocks(block.dtype)) return load_blocks(block, buffer);
  if (has_contiguous_rows(block)) {
    const auto load_run = kernels_.load[static_cast<int>(block.dtype)];
    for (std::int64_t r = 0; r < block.rows; ++r)
      load_run(block.data + r * block.row_stride, buffer + r * block.columns, block.columns);
    return;
  }
  with_element(block.dtype, [&](auto element) {
    for_each_element(block, [&](const std::byte* at, std::int64_t i) {
      std::memcpy(&element, at, sizeof element);
      buffer[i] = cast<T>(element);
    });
  });
}

template <class T>
void TileAccess<T>::store(const T* buffer, const Block& block) const {
  if (has_contiguous_rows(block)) {
    const auto store_run = kernels_.store[static_cast<int>(block.dtype)];
    for (std::int64_t r = 0; r < block.rows; ++r)
      store_run(buffer + r * block.columns, block.data + r * block.row_stride, block.columns);
    return;
  }
  with_element(block.dtype, [&](auto element) {
    for_each_element(block, [&](std::byte* at, std::int64_t i) {
      element = cast<decltype(element)>(buffer[i]);
      std::memcpy(at, &element, sizeof element);
    });
  });
}

template <class T>
void TileAccess<T>::store(const T* buffer, const Block& block, TileRandom random,
                          std::int64_t first) const {
  if (is_in_blocks(block.dtype)) return store_blocks(buffer, block, random, first);
  if (!is_float(block.dtype)) return;
  const auto store_run = kernels_.store_at_random[static_cast<int>(block.dtype)];
  if (!store_run) return store(buffer, block);
  const auto place = [first](std::int64_t i) { return static_cast<std::uint32_t>(first + i); };
  if (has_contiguous_rows(block)) {
    for (std::int64_t r = 0; r < block.rows; ++r)
      store_run(buffer + r * block.columns, block.data + r * block.row_stride, block.columns,
                random, place(r * block.columns));
    return;
  }
  for_each_element(block, [&](std::byte* at, std::int64_t i) {
    store_run(buffer + i, at, 1, random, place(i));
  });
}

// A block of elements of one tile.
template <class T>
void TileAccess<T>::load_blocks(const Block& block, T* buffer) const {
  const auto load = active_tier().kernels->load_blocks[is_signed(block.dtype)];
  if constexpr (std::is_same_v<T, float>) {
    load(block.data, block.powers, buffer, block.columns);
  } else {
    alignas(kCacheLine) float floats[kTileSize];
    load(block.data, block.powers, floats, block.columns);
    std::copy_n(floats, block.columns, buffer);
  }
}

template <class T>
void TileAccess<T>::store_blocks(const T* buffer, const Block& block, TileRandom random,
                                 std::int64_t first) const {
  const auto store = active_tier().kernels->store_blocks[is_signed(block.dtype)];
  const auto place = static_cast<std::uint32_t>(first);
  if constexpr (std::is_same_v<T, float>) {
    store(buffer, block.data, block.powers, block.columns, random, place);
  } else {
    alignas(kCacheLine) float floats[kTileSize];
    std::transform(buffer, buffer + block.columns, floats,
                   [](T x) { return static_cast<float>(x); });
    store(floats, block.data, block.powers, block.columns, random, place);
  }
}

template <class T>
void TileAccess<T>::join(const Block& upper, const Block& lower, T* buffer) const {
  if (has_contiguous_rows(upper) && has_contiguous_rows(lower)) {
    for (std::int64_t r = 0; r < upper.rows; ++r)
      kernels_.join(upper.data + r * upper.row_stride, lower.data + r * lower.row_stride,
                    buffer + r * upper.columns, upper.columns);
    return;
  }
  for_each_pair(upper, lower, [&](const std::byte* high, const std::byte* low, std::int64_t i) {
    kernels_.join(high, low, buffer + i, 1);
  });
}

template <class T>
void TileAccess<T>::split(const T* buffer, const Block& upper, const Block& lower) const {
  if (has_contiguous_rows(upper) && has_contiguous_rows(lower)) {
    for (std::int64_t r = 0; r < upper.rows; ++r)
      kernels_.split(buffer + r * upper.columns, upper.data + r * upper.row_stride,
                     lower.data + r * lower.row_stride, upper.columns);
    return;
  }
  for_each_pair(upper, lower, [&](std::byte* high, std::byte* low, std::int64_t i) {
    kernels_.split(buffer + i, high, low, 1);
  });
}

template <class T>
void TileAccess<T>::clear(const Block& block) const {
  const std::int64_t item = item_size(block.dtype);
  if (has_contiguous_rows(block)) {
    for (std::int64_t r = 0; r < block.rows; ++r)
      std::memset(block.data + r * block.row_stride, 0,
                  static_cast<std::size_t>(block.columns * item));
    return;
  }
  for_each_element(block, [&](std::byte* at, std::int64_t) {
    std::memset(at, 0, static_cast<std::size_t>(item));
  });
}

template class TileAccess<float>;
template class TileAccess<double>;

}  // namespace fusestep::cpu
