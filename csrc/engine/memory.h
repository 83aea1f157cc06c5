// The memory a set of arrays occupies, and whether something else touches it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arrays/array.h"

namespace fusestep::engine {

class OccupiedMemory {
 public:
  // `name` must outlive this object; the array's geometry must too.
  void add(const arrays::Array& array, const std::string& name);

  // Call after the last add. Throws ValueError where two of the arrays share memory.
  void seal();

  // A stretch of memory that nothing occupies: [first, last).
  struct Gap {
    std::uintptr_t first = 0, last = 0;
    std::uint64_t generation = 0;
  };

  // The name of an array that shares memory with `array`, or null; then `gap` is where it lies, and
  // empty if that is not all its own.
  const std::string* overlapping(const arrays::Array& array, Gap& gap) const;

  // True where `array` lies in a gap of this very memory: freshly allocated gradients usually lie
  // near the ones before.
  bool contains(const Gap& gap, const arrays::Array& array) const {
    const auto [first, last] = array.interval();
    return gap.generation == generation_ && gap.first <= first && last <= gap.last;
  }

  // Differs from that of any other memory, and from 0.
  std::uint64_t generation() const { return generation_; }

 private:
  struct Entry {
    arrays::Array::Interval interval;
    std::uintptr_t reach;  // one past the last byte of this and all earlier entries
    const arrays::Array* array;
    const std::string* name;
  };
  std::vector<Entry> entries_;  // sorted by the first byte
  std::uint64_t generation_ = next_generation();
  static std::uint64_t next_generation();
};

}  // namespace fusestep::engine
