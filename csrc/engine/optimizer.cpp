#include "engine/optimizer.h"

#include <string>
#include <string_view>
#include <utility>

#include "core/errors.h"
#include "cpu/fp_environment.h"

namespace fusestep::engine {

void Optimizer::add(std::string name, PyObject* parameter, const std::vector<PyObject*>& states) {
  const std::vector<std::string_view> state_names = group.rule->state_names();
  if (states.size() != state_names.size())
    throw ValueError(name + " came with " + std::to_string(states.size()) +
                     " state arrays; expected " + std::to_string(state_names.size()));
  Slot& slot = slots_.emplace_back(std::move(name), state_names);
  const auto view = [](PyObject* object, const std::string& label) {
    arrays::Array array = arrays::from_object(object, {"", label});
    array.pin();
    return array;
  };
  std::vector<arrays::Array> state_arrays;
  for (std::size_t i = 0; i < states.size(); ++i)
    state_arrays.push_back(view(states[i], slot.state_label(i)));
  slot.bind(view(parameter, slot.name()), std::move(state_arrays));
  memory_.reset();
}

OccupiedMemory& Optimizer::occupied_memory() {
  if (!memory_) {
    memory_.emplace();
    for (const Slot& slot : slots_) slot.occupy(*memory_);
    memory_->seal();
  }
  return *memory_;
}

void Optimizer::step(PyObject* const* gradients, std::size_t count, double lr,
                     const StepArguments& arguments) {
  const Turnstile::Turn turn(turnstile);
  const cpu::IeeeEnvironment ieee;  // coefficients depend on the rounding mode, too
  check_rate(lr);
  group.lr = lr;
  const ClearAtExit release_references{updates_};
  collect(gradients, count);
  stepper.prepare(updates_, occupied_memory(), arguments);
  stepper.take(updates_, arguments);
}

void Optimizer::collect(PyObject* const* gradients, std::size_t count) {
  if (count != slots_.size())
    throw ValueError("got " + std::to_string(count) + " gradients for " +
                     std::to_string(slots_.size()) + " parameters; give None for a parameter " +
                     "that should not move");
  bool foreign = false;
  for (std::size_t i = 0; i < count; ++i) {
    if (gradients[i] == Py_None) continue;
    Slot& slot = slots_[i];
    slot.check_is_current();
    updates_.emplace_back(&slot, &group,
                          arrays::from_object(gradients[i], {"the gradient of ", slot.name()}));
    foreign = foreign || updates_.back().gradient.is_foreign();
  }
  // Exporting an array of another library runs its code, which may have done anything.
  if (foreign)
    for (const Update& update : updates_) update.slot->check_is_current();
}

}  // namespace fusestep::engine
