// Vectors whose elements begin at a cache line: what a loop writes in whole vectors can then be
// read in whole vectors at once, without a wait until it is in the cache.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace fusestep {

template <class T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  AlignedAllocator() = default;
  template <class Other>
  AlignedAllocator(const AlignedAllocator<Other>&) {}

  T* allocate(std::size_t size) {
    return static_cast<T*>(::operator new(size * sizeof(T), kAlignment));
  }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, kAlignment); }

  bool operator==(const AlignedAllocator&) const = default;
};

template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace fusestep
