// An optimizer: a rule, its parameters, and a step that happens wholly or not at all.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/step.h"
#include "engine/memory.h"
#include "engine/slot.h"
#include "engine/turn.h"
#include "rules/any_rule.h"

namespace fusestep::engine {

// What holds for every rule, from one step to the next.
struct Settings {
  bool maximize = false;
  bool skip_nonfinite = false;
  std::optional<double> max_norm;
};

struct StepArguments {
  double lr;
  double grad_scale = 1;
  bool zero_grad = false;
};

class Optimizer {
 public:
  explicit Optimizer(std::unique_ptr<rules::AnyRule> rule) : rule_(std::move(rule)) {}

  void add(std::string name, PyObject* parameter, const std::vector<PyObject*>& states);
  void seal() { occupied_memory(); }  // after the last add; throws where parameters overlap

  // gradients[i] belongs to parameter i; None leaves it, and its state, as they are.
  void step(PyObject* const* gradients, std::size_t count, const StepArguments& arguments);

  rules::AnyRule& rule() { return *rule_; }
  Slot& slot(std::size_t i) { return slots_.at(i); }

  Settings settings;
  std::int64_t steps = 0;          // that moved at least one parameter
  std::int64_t skipped_steps = 0;  // that met a gradient which was not finite
  Turnstile turnstile;

 private:
  // The parameters that move in a step, in order, each with the scalars it will have afterwards.
  struct Move {
    Slot* slot;
    rules::Progress next;
  };

  void prepare(PyObject* const* gradients, std::size_t count, bool zero_grad);
  void check_gradients_are_disjoint();
  void add_coefficients(double lr);
  bool run(const StepArguments& arguments, Settings settings);
  OccupiedMemory& occupied_memory();

  std::unique_ptr<rules::AnyRule> rule_;
  std::vector<Slot> slots_;
  std::optional<OccupiedMemory> memory_;

  // The parameters whose last gradients were found to be disjoint from each other. Void as soon as
  // one of them meets other memory, with or without zero_grad.
  std::vector<const Slot*> disjoint_gradients_;

  // Of the step under way; members to keep their memory from one step to the next.
  std::vector<Move> moves_;
  std::vector<const cpu::Work*> work_;
  std::vector<arrays::Array> gradients_;
  std::vector<rules::Coefficients> coefficients_;
};

}  // namespace fusestep::engine
