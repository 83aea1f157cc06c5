// The native half of a torch.optim.Optimizer: follows its param_groups and its state, which users
// may change at any time, and takes the step.
//
// Python tells it once what there is (add_group, add_parameter, seal). From then on each step
// compares the objects in those lists and dicts with the ones it was told, which costs nanoseconds
// a parameter, and reads every tensor's address anew: a parameter or its state may have been given
// other memory (p.data = ..., share_memory_()), and a step must neither miss that nor write to
// memory that is no longer theirs. Where an object is not the one it was told, the step reports
// `stale`, with nothing changed, and Python tells again.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arrays/state_memory.h"
#include "arrays/torch.h"
#include "engine/memory.h"
#include "engine/slot.h"
#include "engine/stepper.h"
#include "engine/turn.h"
#include "engine/watched_dict.h"

namespace fusestep::engine {

enum class Outcome {
  done,         // parameters have moved, or none had a gradient
  stale,        // tell me again what there is
  new_options,  // tell me again the options of the groups
  needs_norm,   // parameters are sharded: other processes know the rest of the norm
  skipped,      // a gradient was not finite
};

class TorchOptimizer {
 public:
  explicit TorchOptimizer(arrays::TorchTensors tensors) : tensors_(std::move(tensors)) {}

  void forget();

  // `options` are the keys of the group, besides lr, that decide how its parameters move.
  void add_group(const pybind11::dict& dict, std::unique_ptr<rules::AnyRule> rule, bool maximize,
                 const pybind11::set& options);

  void set_options(std::size_t group, const pybind11::dict& dict,
                   std::unique_ptr<rules::AnyRule> rule, bool maximize,
                   const pybind11::set& options);

  struct Parameter {
    std::string name;
    PyObject* tensor;
    std::vector<PyObject*> states;       // in the order of the rule's names
    std::int64_t updates = 0;            // it has had, where no scalar says it
    std::optional<std::size_t> scalars;  // its place in the tensors of scalars
    bool is_ready = false;               // has all the state that it needs
    bool is_sharded = false;             // this process holds a part of it
  };
  void add_parameter(Parameter parameter);  // to the last group

  // `scalars` has a tensor of floats for each scalar of the rule.
  void seal(const pybind11::dict& state, const std::vector<pybind11::object>& scalars);

  Outcome step(PyObject* groups, PyObject* state, const StepArguments& arguments);

  // The norm of each gradient that a step would use, with the parameter's place in all groups;
  // nothing where it is stale.
  struct Norm {
    std::size_t parameter;
    cpu::GradientNorm norm;
  };
  std::optional<std::vector<Norm>> gradient_norms(PyObject* groups, PyObject* state);

  Stepper stepper;
  Turnstile turnstile;

 private:
  // Pointers to objects are borrowed: that a list or dict holds them is checked before each use.
  struct FollowedDict {  // one of param_groups
    FollowedDict(const pybind11::dict& dict, const pybind11::set& options);
    PyObject* lr_key = nullptr;
    PyObject* params = nullptr;
    WatchedDict watched;  // finds the other two
  };
  struct FollowedGroup {
    Group group;
    FollowedDict dict;
    std::size_t begin, end;  // its parameters
  };
  struct FollowedParameter {
    PyObject* tensor;
    std::array<PyObject*, kMaxStates> states;
    std::array<std::shared_ptr<const arrays::StateMemory>, kMaxStates> state_memory{};  // if ours
    std::size_t state_count = 0;
    Slot slot;
    std::optional<std::size_t> scalars;
    bool is_ready, is_sharded;
    bool is_bound = false;  // the slot has been told where they lie
    std::size_t index;
  };
  struct FollowedState {
    PyObject* key;
    PyObject* value;
    std::optional<WatchedDict> entry;
  };
  struct StepUnderWay;

  Outcome look_at(PyObject* groups, PyObject* state);
  bool holds_its_parameters(const FollowedGroup& group) const;
  bool is_known_state(PyObject* state) const;
  bool collect();
  bool is_where_it_was(const FollowedParameter& parameter) const;
  void follow_memory(FollowedParameter& parameter);
  void find_scalars();
  template <class Visit>
  void for_each_scalar(const FollowedParameter& parameter, Visit visit) const;
  void read_progress(FollowedParameter& parameter);
  void write_progress();
  void increment_versions() const noexcept;
  void keep_alive();
  const OccupiedMemory& occupied_memory();

  arrays::TorchTensors tensors_;
  std::deque<FollowedGroup> groups_;
  std::deque<FollowedParameter> parameters_;
  std::vector<FollowedState> state_;
  std::optional<OccupiedMemory> memory_;
  struct FollowedScalar {
    pybind11::object tensor;
    arrays::Array view;
  };
  std::vector<FollowedScalar> scalars_;  // step, momentum product

  // Of the step under way.
  std::vector<Update> updates_;
  std::vector<FollowedParameter*> moving_;
  std::vector<pybind11::object> copied_gradients_;  // that are not what the step reads
  std::vector<pybind11::object> alive_;
};

}  // namespace fusestep::engine
