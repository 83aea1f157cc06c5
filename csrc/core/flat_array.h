// An array as the sequence of its elements in C order, whatever its strides.
//
// Selections name elements by their number in this order, which is the same for every layout. Steps
// that move all elements walk in the order of memory instead (layout.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "core/operand.h"

namespace fusestep {

class FlatArray {
 public:
  // Looks at other memory from now on. Keeps its own, so that planning a step allocates nothing.
  void view(const Operand& operand, const Geometry& geometry);

  DType dtype() const { return operand_.dtype; }
  const Operand& operand() const { return operand_; }

  // The number of elements that lie one stride apart from here on.
  std::int64_t stretch(std::int64_t element) const {
    return axes_.back().extent - element % axes_.back().extent;
  }

  // True where all of them do.
  bool is_one_stretch() const { return axes_.size() == 1; }

  // `count` elements, no more than the stretch has.
  Block block(std::int64_t element, std::int64_t count) const {
    return {
        at(element), operand_.dtype, 1, count, 0, axes_.back().stride, operand_.powers_at(element)};
  }

  std::byte* at(std::int64_t element) const {
    std::byte* address = operand_.data;
    for (std::size_t k = axes_.size(); k-- > 1; element /= axes_[k].extent)
      address += (element % axes_[k].extent) * axes_[k].stride;
    return address + element * axes_[0].stride;
  }

  // Calls visit(block, number of its first element less `begin`) for stretches of `count` elements.
  template <class Visit>
  void for_each_stretch(std::int64_t begin, std::int64_t count, Visit visit) const {
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t some = std::min(count - done, stretch(begin + done));
      visit(block(begin + done, some), done);
      done += some;
    }
  }

 private:
  struct Axis {
    std::int64_t extent, stride;  // the stride in bytes
  };
  Operand operand_;
  std::vector<Axis> axes_{{1, 0}};  // outermost first, and as few as the strides allow
};

}  // namespace fusestep
