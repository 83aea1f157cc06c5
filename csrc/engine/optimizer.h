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
  // Has parameter i, with its state, lie elsewhere from now on, perhaps with more rows. Throws
  // where it cannot, and changes nothing then.
  void move(std::size_t i, PyObject* parameter, const std::vector<PyObject*>& states);

  void seal() { occupied_memory(); }  // after the last add; throws where parameters overlap

  // gradients[i] belongs to parameter i; None leaves it, and its state, as they are.
  // Without `lr`, the learning rate is the one that was last set. `choices`, one for each parameter
  // or none at all, say which part of it moves; null: all.
  using Choices = std::vector<const selections::Choice*>;
  void step(PyObject* const* gradients, std::size_t count, std::optional<double> lr,
            const StepArguments& arguments, const Choices& choices = {});

  // For steps that a CUDA graph may capture: step counts and learning rate are on the GPU, where
  // all parameters must be.
  void make_capturable();
  void set_rate(double lr);

  // Sets an option of the rule.
  void set_option(const std::string& name, double value);
  void set_maximize(bool value);

  // Parameter i is not to be subject to weight decay.
  void exempt_from_decay(std::size_t i);
  const Group& group_of(std::size_t i) const {
    return without_decay_ && is_exempt_.at(i) ? *without_decay_ : group;
  }

  // Keeps an average of parameter i in this array, and a copy in that one.
  void set_average(std::size_t i, PyObject* average);
  void set_copy(std::size_t i, PyObject* copy);
  void set_lower_half(std::size_t i, PyObject* lower_half);

  // Whether a step may turn out to be left out.
  void set_skip_nonfinite(bool value);

  // Rows that a step does not touch are brought up to date when they are next used.
  void keep_history();

  // Brings rows of each parameter up to date; without numbers, all of them. None: not this one.
  using RowNumbers = std::vector<std::optional<std::vector<std::int64_t>>>;
  void catch_up(const RowNumbers& numbers);
  void flush();
  void catch_up(std::size_t i);  // all rows of parameter i
  Slot& slot(std::size_t i) { return slots_.at(i); }
  std::size_t size() const { return slots_.size(); }

  // Steps that rows have missed are made up for first, with the anchor there was.
  void set_anchor(std::size_t i, double lambda, PyObject* reference, PyObject* importance);
  void release_anchor(std::size_t i);

  // The progress of parameter i. Waits for a GPU.
  rules::Progress progress(std::size_t i);
  void set_progress(std::size_t i, const rules::Progress& progress);

  std::int64_t steps();
  std::int64_t skipped_steps();
  void set_counts(std::int64_t steps, std::int64_t skipped_steps);

  bool is_swapped = false;  // averages are in the parameters' place: no steps meanwhile

  std::uint64_t seed = 0;  // of random selections

  Group group;
  Stepper stepper;
  Turnstile turnstile;

 private:
  void bind(Slot& slot, PyObject* parameter, const std::vector<PyObject*>& states);
  void collect(PyObject* const* gradients, std::size_t count, const Choices& choices);
  OccupiedMemory& occupied_memory();
  void wait_for_borrowed_gradients() const;
  bool is_on_one_gpu() const;
  void pull();
  void place_progress();
  void count_blocks_here(const Choices& choices);

  std::deque<Slot> slots_;
  std::optional<Group> without_decay_;  // of parameters that are exempt from it
  std::vector<bool> is_exempt_;
  std::optional<OccupiedMemory> memory_;
  std::vector<Update> updates_;  // of the step under way
  bool is_capturable_ = false;
};

}  // namespace fusestep::engine
