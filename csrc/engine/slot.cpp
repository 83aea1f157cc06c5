#include "engine/slot.h"

#include <algorithm>
#include <array>

#include "core/errors.h"

namespace fusestep::engine {

using arrays::Array;
using arrays::Label;
using arrays::shape_text;

namespace {

bool same_shape(const Array& a, const Array& b) {
  return std::ranges::equal(a.geometry().shape, b.geometry().shape);
}

void check_updatable(const Array& array, const std::string& name) {
  if (!array.writable) throw ValueError(name + " is read-only");
  if (!array.c_contiguous && !elements_are_disjoint(array.geometry(), item_size(array.dtype)))
    throw ValueError(name + " overlaps itself: several of its elements share one place in memory");
}

}  // namespace

Slot::Slot(std::string name, PyObject* parameter, const std::vector<std::string>& state_names,
           const std::vector<PyObject*>& states)
    : name_(std::move(name)), parameter_(arrays::from_object(parameter, Label{"", name_})) {
  parameter_.pin();
  check_updatable(parameter_, name_);
  all_in_c_order_ = parameter_.c_contiguous;
  work.compute = parameter_.dtype == DType::float64 ? DType::float64 : DType::float32;

  for (std::size_t i = 0; i < states.size(); ++i) {
    const std::string& label = state_labels_.emplace_back("the " + state_names[i] + " of " + name_);
    Array& state = states_.emplace_back(arrays::from_object(states[i], Label{"", label}));
    state.pin();
    if (!same_shape(state, parameter_))
      throw ValueError(label + " has shape " + shape_text(state) + "; expected " +
                       shape_text(parameter_));
    if (state.dtype != DType::float32 && state.dtype != DType::float64)
      throw TypeError(label + " has dtype " + name_of(state.dtype) +
                      "; expected float32 or float64");
    check_updatable(state, label);
    all_in_c_order_ = all_in_c_order_ && state.c_contiguous;
    if (state.dtype == DType::float64) work.compute = DType::float64;
  }
}

void Slot::occupy(OccupiedMemory& memory) const {
  memory.add(parameter_, name_);
  for (std::size_t i = 0; i < states_.size(); ++i) memory.add(states_[i], state_labels_[i]);
}

Array Slot::prepare(PyObject* object, const OccupiedMemory& memory, bool clears_gradient) {
  check_parameter_is_current();
  Array gradient = arrays::from_object(object, Label{"the gradient of ", name_});
  check_gradient(gradient, memory, clears_gradient);
  plan(gradient);
  return gradient;
}

void Slot::check_parameter_is_current() const {
  if (!parameter_.is_current())
    throw ValueError(name_ + " has been resized, reshaped or made read-only since the optimizer " +
                     "was created; create a new optimizer and load this one's state_dict()");
}

void Slot::check_gradient(const Array& gradient, const OccupiedMemory& memory,
                          bool clears_gradient) {
  const auto label = [&] { return "the gradient of " + name_; };
  if (!same_shape(gradient, parameter_))
    throw ValueError(label() + " has shape " + shape_text(gradient) + "; expected " +
                     shape_text(parameter_));
  if (clears_gradient && !gradient.writable)
    throw ValueError(label() + " is read-only, so zero_grad=True cannot clear it");
  if (clears_gradient && !gradient.c_contiguous &&
      !elements_are_disjoint(gradient.geometry(), item_size(gradient.dtype)))
    throw ValueError(label() + " overlaps itself, so zero_grad=True would clear elements unused");

  const auto interval = gradient.interval();
  if (interval.first == disjoint_.first && interval.last == disjoint_.last && gradient.c_contiguous)
    return;
  if (const std::string* other = memory.overlapping(gradient))
    throw ValueError(label() + " shares memory with " + *other);
  disjoint_ = gradient.c_contiguous ? interval : Array::Interval{0, 0};
}

void Slot::plan(const Array& gradient) {
  Iteration& iteration = work.iteration;
  iteration.operand[kParameter] = parameter_.operand();
  iteration.operand[kGradient] = gradient.operand();
  for (std::size_t i = 0; i < states_.size(); ++i)
    iteration.operand[kState + i] = states_[i].operand();

  if (all_in_c_order_ && gradient.c_contiguous)
    return iteration.plan_dense(parameter_.size, 2 + static_cast<int>(states_.size()));

  std::array<Geometry, kMaxOperands> geometry;
  geometry[kParameter] = parameter_.geometry();
  geometry[kGradient] = gradient.geometry();
  for (std::size_t i = 0; i < states_.size(); ++i) geometry[kState + i] = states_[i].geometry();
  iteration.plan(std::span(geometry).first(2 + states_.size()));
}

}  // namespace fusestep::engine
