#include "core/flat_array.h"

namespace fusestep {

void FlatArray::view(const Operand& operand, const Geometry& geometry) {
  operand_ = operand;
  axes_.clear();
  for (std::size_t k = 0; k < geometry.shape.size(); ++k) {
    const Axis axis{geometry.shape[k], geometry.strides[k]};
    if (axis.extent == 1) continue;
    const bool goes_on = !axes_.empty() && axes_.back().stride == axis.extent * axis.stride;
    if (goes_on)
      axes_.back() = {axes_.back().extent * axis.extent, axis.stride};
    else
      axes_.push_back(axis);
  }
  if (axes_.empty()) axes_.push_back({1, item_size(operand.dtype)});
}

}  // namespace fusestep
