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

  // The name of an array that shares memory with `array`, or null.
  const std::string* overlapping(const arrays::Array& array) const;

 private:
  struct Entry {
    arrays::Array::Interval interval;
    std::uintptr_t reach;  // one past the last byte of this and all earlier entries
    const arrays::Array* array;
    const std::string* name;
  };
  std::vector<Entry> entries_;  // sorted by the first byte
};

}  // namespace fusestep::engine
