#include "engine/memory.h"

#include <algorithm>

#include "core/errors.h"

namespace fusestep::engine {

void OccupiedMemory::add(const arrays::Array& array, const std::string& name) {
  if (array.size > 0) entries_.push_back({array.interval(), 0, &array, &name});
}

void OccupiedMemory::seal() {
  std::sort(entries_.begin(), entries_.end(),
            [](const Entry& a, const Entry& b) { return a.interval.first < b.interval.first; });
  std::uintptr_t reach = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    for (std::size_t k = i; reach > entry.interval.first && k-- > 0;) {
      if (arrays::share_memory(*entries_[k].array, *entry.array))
        throw ValueError(*entries_[k].name + " and " + *entry.name + " share memory");
      if (entries_[k].reach <= entry.interval.first) break;
    }
    entry.reach = reach = std::max(reach, entry.interval.last);
  }
}

const std::string* OccupiedMemory::overlapping(const arrays::Array& array, Gap& gap) const {
  const auto [first, last] = array.interval();
  gap = {};
  const Gap none{first, first, generation_};
  if (first == last) {
    gap = none;
    return nullptr;
  }
  auto entry =
      std::partition_point(entries_.begin(), entries_.end(),
                           [last = last](const Entry& e) { return e.interval.first < last; });
  const std::uintptr_t next = entry == entries_.end() ? UINTPTR_MAX : entry->interval.first;
  const std::uintptr_t reach = entry == entries_.begin() ? 0 : (entry - 1)->reach;
  if (reach <= first) {
    gap = {reach, next, generation_};
    return nullptr;
  }
  while (entry != entries_.begin()) {
    --entry;
    if (entry->reach <= first) break;  // neither this one nor any before it gets this far
    if (arrays::share_memory(*entry->array, array)) return entry->name;
  }
  gap = none;  // it lies between the elements of others
  return nullptr;
}

std::uint64_t OccupiedMemory::next_generation() {
  static std::uint64_t generation = 0;  // guarded by the GIL
  return ++generation;
}

}  // namespace fusestep::engine
