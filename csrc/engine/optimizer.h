// An optimizer of arrays: one rule, parameters that stay where they are, gradients that are handed
// over with each step.
#pragma once

#include <Python.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/memory.h"
#include "engine/slot.h"
#include "engine/stepper.h"
#include "engine/turn.h"
#include "rules/any_rule.h"

namespace fusestep::engine {

class Optimizer {
 public:
  explicit Optimizer(std::unique_ptr<rules::AnyRule> rule) : group{std::move(rule)} {}

  void add(std::string name, PyObject* parameter, const std::vector<PyObject*>& states);
  void seal() { occupied_memory(); }  // after the last add; throws where parameters overlap

  // gradients[i] belongs to parameter i; None leaves it, and its state, as they are.
  void step(PyObject* const* gradients, std::size_t count, double lr,
            const StepArguments& arguments);

  Slot& slot(std::size_t i) { return slots_.at(i); }

  Group group;
  Stepper stepper;
  Turnstile turnstile;

 private:
  void collect(PyObject* const* gradients, std::size_t count);
  OccupiedMemory& occupied_memory();

  std::deque<Slot> slots_;
  std::optional<OccupiedMemory> memory_;
  std::vector<Update> updates_;  // of the step under way
};

}  // namespace fusestep::engine
