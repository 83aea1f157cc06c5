// Reading and writing tiles of arrays of any layout and type, in the type a rule computes in.
#pragma once

#include "core/flat_array.h"
#include "core/operand.h"
#include "cpu/kernels.h"

namespace fusestep::cpu {

inline constexpr std::uintptr_t kCacheLine = 64;

template <class T>
class TileAccess {
 public:
  explicit TileAccess(const Kernels<T>& kernels) : kernels_(kernels) {}

  // The block's own memory where a loop can use it as it is, else null.
  static T* in_place(const Block& block) {
    const bool usable = block.dtype == kComputeType<T> && block.contiguous() &&
                        reinterpret_cast<std::uintptr_t>(block.data) % alignof(T) == 0;
    return usable ? reinterpret_cast<T*>(block.data) : nullptr;
  }

  // The block's elements, row after row: where they are, or copied to `buffer`.
  T* read(const Block& block, T* buffer) const {
    if (T* elements = in_place(block)) return elements;
    load(block, buffer);
    return buffer;
  }

  // The same for elements of an array in C order.
  T* read(const FlatArray& array, std::int64_t begin, std::int64_t count, T* buffer) const {
    if (array.stretch(begin) >= count) return read(array.block(begin, count), buffer);
    array.for_each_stretch(begin, count, [&](const Block& block, std::int64_t offset) {
      load(block, buffer + offset);
    });
    return buffer;
  }

  void load(const Block& block, T* buffer) const;         // block -> buffer
  void store(const T* buffer, const Block& block) const;  // buffer -> block

  // The same, rounded at random where the block's type has 16 bits, or 8; its elements are those of
  // a tile from `first` on.
  void store(const T* buffer, const Block& block, TileRandom random, std::int64_t first) const;
  void clear(const Block& block) const;  // zeros -> block

  // Of numbers that are kept in two halves (core/split.h).
  void join(const Block& upper, const Block& lower, T* buffer) const;
  void split(const T* buffer, const Block& upper, const Block& lower) const;

 private:
  void load_blocks(const Block& block, T* buffer) const;
  void store_blocks(const T* buffer, const Block& block, TileRandom random,
                    std::int64_t first) const;

  const Kernels<T>& kernels_;
};

}  // namespace fusestep::cpu
