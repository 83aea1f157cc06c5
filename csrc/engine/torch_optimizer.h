// The native half of a torch.optim.Optimizer: follows its param_groups and its state, which users
// may change at any time, and takes the step.
//
// Python tells it once what there is. From then on each step compares the objects in those lists
// and dicts with the ones it was told, which costs nanoseconds a parameter, and reads addresses
// anew: a parameter or its state may have been given other memory (p.data = ..., share_memory_()),
// and a step must neither miss that nor write to memory that is no longer theirs. Where an object
// is not the one it was told, Python tells again, inside the same step and before anything moves.
//
// One thread at a time: step() takes the turn, and calls the Teller while it has it. The functions
// by which Python tells are for the Teller alone. See docs/adr/0005.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "arrays/state_memory.h"
#include "arrays/torch.h"
#include "engine/memory.h"
#include "engine/slot.h"
#include "engine/stepper.h"
#include "engine/turn.h"
#include "engine/watched_dict.h"

namespace fusestep::engine {

// What Python does for a step.
class Teller {
 public:
  virtual ~Teller() = default;

  virtual pybind11::object groups() = 0;
  virtual pybind11::object state() = 0;

  // Describe everything; for a step, making what state is missing.
  virtual void tell_everything(bool is_for_a_step) = 0;

  // Describe the options of all groups; false where they ask for other state.
  virtual bool tell_options() = 0;

  struct Norm {
    std::size_t parameter;  // its place in all groups
    GradientNorm norm;
  };
  // The norm of all gradients over all processes, given those of this one's parts.
  virtual GradientNorm global_norm(const std::vector<Norm>& norms) = 0;

  // Take back the state that was made for this step, because it does not happen; or keep it.
  virtual void undo() = 0;
  virtual void keep() = 0;
};

class TorchOptimizer {
 public:
  explicit TorchOptimizer(arrays::TorchTensors tensors) : tensors_(std::move(tensors)) {}

  // What a loss scaler keeps on the GPU where all parameters are; or None.
  struct ScalingTensors {
    pybind11::object loss_scale, found_inf;
  };

  // Returns when parameters have moved, or none had a gradient, or one was not finite and the step
  // is to be skipped then. `groups` and `state` are the Teller's: fetching them costs time.
  // `selections` are what moves of each parameter, by tensor: of those that are not there, all.
  struct Selections {
    std::unordered_map<PyObject*, const selections::Choice*> choices;

    // Gradients that are samples (fusestep.Samples, fusestep.Outer), in place of a parameter's own.
    std::unordered_map<PyObject*, PyObject*> samples = {};

    // Null for those that have none.
    PyObject* samples_of(PyObject* tensor) const {
      const auto found = samples.find(tensor);
      return found == samples.end() ? nullptr : found->second;
    }

    const selections::Choice* of(PyObject* tensor) const {
      const auto found = choices.empty() ? choices.end() : choices.find(tensor);
      return found == choices.end() ? nullptr : found->second;
    }
  };
  void step(pybind11::handle groups, pybind11::handle state, StepArguments arguments,
            const ScalingTensors& scaling, const Selections& selections, Teller& teller);

  // Brings rows that have missed steps up to date: these of each parameter, or all. The numbers are
  // those of rows that there are.
  using RowNumbers = std::vector<std::optional<std::vector<std::int64_t>>>;
  void catch_up(const std::optional<RowNumbers>& numbers, Teller& teller);

  // Has Python tell everything again: there is something else to be told of the same objects.
  void ask_again() { is_outdated_ = true; }

  // On a GPU it decides where the step counts are: Python is asked to tell again.
  void set_skip_nonfinite(bool value) {
    is_outdated_ = is_outdated_ || value != stepper.settings.skip_nonfinite;
    stepper.settings.skip_nonfinite = value;
  }

  // Wait for a GPU.
  std::int64_t steps();
  std::int64_t skipped_steps();

  // ---- for the Teller, during a step ----

  void forget();

  struct GroupOptions {
    pybind11::dict dict;
    std::unique_ptr<rules::AnyRule> rule;
    bool maximize;
    pybind11::set watched;  // the keys, besides lr, that decide how the parameters move
    bool is_mutable;        // a value may change without being replaced
  };
  void add_group(GroupOptions options);
  void set_options(std::size_t group, GroupOptions options);

  struct Anchor {
    double strength;
    pybind11::object reference, importance;  // the latter may be None
  };
  // What a parameter of 16 bits is the rounding of.
  struct Master {
    pybind11::object tensor;
    std::int64_t version;  // that the parameter had when it was
  };
  struct Parameter {
    pybind11::object tensor;
    std::string name;
    std::vector<pybind11::object> states;   // in the order of the rule's names
    std::vector<pybind11::object> powers;   // of each, where state is in 8 bits
    std::vector<pybind11::object> scalars;  // in the order of the rule's names
    // Where the scalars are: elements of tensors of which they are views, or of their own.
    std::vector<std::pair<pybind11::object, std::size_t>> places;
    bool is_ready;    // has all the state that it needs
    bool is_first;    // its next update is the first, if no scalar counts them
    bool is_sharded;  // this process holds a part of it
    // Where rows that a step does not touch miss it: it outlives what is told here.
    std::shared_ptr<rules::RowHistory> history;
    std::optional<Anchor> anchor;
    // Where blocks have come differently far: likewise.
    std::shared_ptr<rules::BlockProgress> block_progress;
    pybind11::object average;  // or None
    std::optional<Master> master;
    pybind11::object lower_half;  // of the parameter's bits; or None
  };
  void add_parameter(Parameter parameter);  // to the last group

  // The progress of parameters on GPUs is kept there, and their scalars are there, too.
  void set_resident(bool value) {
    is_resident_ = value;
    is_placed_ = false;
  }

  // The parameters on GPUs that no step has moved yet, with the state that they were told with.
  // Waits for the GPUs. The pointers are to be compared only.
  struct Unused {
    PyObject* tensor;
    std::vector<PyObject*> states;
  };
  std::vector<Unused> unused();

  // Takes note of the state. What is no longer what it was when its parameter was told (another
  // thread has changed it) will be found stale.
  void seal(const pybind11::dict& state);

  std::uint64_t seed = 0;  // of random selections, and of rounding

  // The decay of averages after so many steps, to be asked in each: a callable, or null.
  pybind11::object ema_schedule;

  // The averages have taken the parameters' place, which therefore must not move.
  bool is_swapped = false;

  Stepper stepper;
  Turnstile turnstile;

 private:
  enum class Outcome { done, skipped, stale, new_options, needs_norm };

  // Pointers to objects are borrowed: that a list or dict holds them is checked before each use.
  struct FollowedDict {  // one of param_groups
    explicit FollowedDict(const GroupOptions& options);
    PyObject* lr_key = nullptr;
    PyObject* params = nullptr;
    bool is_mutable;
    WatchedDict watched;  // finds the first two
  };
  struct FollowedGroup {
    Group group;
    FollowedDict dict;
    pybind11::object lr;     // of the step under way
    std::size_t begin, end;  // its parameters
  };
  struct ScalarPlace {
    std::size_t tensor, element;  // in scalars_
  };
  // What a tensor in the state of a parameter is to it. In 8 bits, its state is codes and powers.
  enum class Role { state, codes, powers, anchor, importance, average, master, lower_half };
  static constexpr std::size_t kMostTensors = 2 * kMaxStates + 4;
  struct FollowedParameter {
    PyObject* tensor;
    // Its state, and then what else it has, each once.
    std::array<PyObject*, kMostTensors> tensors{};
    std::array<Role, kMostTensors> roles{};
    std::array<std::shared_ptr<const arrays::StateMemory>, kMostTensors> memory{};  // if ours
    std::size_t state_count = 0, tensor_count = 0;
    std::optional<double> anchor_strength;
    // Of a parameter that is the copy of its master: how often it is known to have changed.
    std::optional<std::int64_t> version;
    Slot slot;
    std::vector<ScalarPlace> scalars;
    bool is_ready, is_sharded;
    bool is_bound = false;  // the slot has been told where they lie
    bool had_sparse_gradient = false;
    std::size_t index;
    std::vector<pybind11::object> told;  // until seal(): states, scalars and anchor

    void add(Role role, const pybind11::object& tensor);
    const arrays::Array& view(std::size_t i) const;  // of tensors[i]
    const arrays::Array& view() const;               // of the parameter itself
  };
  struct FollowedState {
    PyObject* key;
    PyObject* value;
    std::optional<WatchedDict> entry;
  };
  struct FollowedScalar {
    pybind11::object tensor;
    arrays::Array view;
  };
  struct StepUnderWay;

  template <class Attempt>
  void settle(Outcome outcome, bool is_for_a_step, Teller& teller, Attempt attempt);
  Outcome attempt_to_catch_up(pybind11::handle groups, pybind11::handle state,
                              const std::optional<RowNumbers>& numbers);
  Outcome attempt(pybind11::handle groups, pybind11::handle state, const StepArguments& arguments,
                  const Selections& selections, bool options_are_new);
  Outcome compare(pybind11::handle groups, pybind11::handle state);
  std::size_t follow_scalar(const pybind11::object& tensor);
  bool holds_its_parameters(const FollowedGroup& group) const;
  bool is_known_state(PyObject* state) const;
  void fetch_rate(FollowedGroup& group);
  bool keeps_history() const;
  bool read_rates(bool options_are_new);
  void complete_rates();
  void find_streams();
  Scaling find_scaling(const ScalingTensors& scaling) const;
  void place_progress();
  void pull();
  bool has_scalars_here(const FollowedParameter& parameter) const;
  bool is_resident(const FollowedParameter& parameter) const;
  void find_resident_scalars(FollowedParameter& parameter) const;
  bool collect(const Selections& selections);
  void view_samples(const Slot& slot, const pybind11::object& samples, Update& update);
  void view_unusual_gradient(FollowedParameter& parameter, const pybind11::object& gradient,
                             Update& update);
  bool is_where_it_was(const FollowedParameter& parameter) const;
  bool has_other_dtype(const FollowedParameter& parameter);
  bool is_as_left(const FollowedParameter& parameter) const;
  void bind(FollowedParameter& parameter);
  void follow_memory(FollowedParameter& parameter);
  void follow_all_memory();
  void follow_history(FollowedParameter& parameter);
  void check_blocks(const Slot& slot) const;
  void check_is_not_swapped() const;
  std::optional<double> ema_decay();
  void prepare(const StepArguments& arguments);
  std::vector<Teller::Norm> gradient_norms();
  void find_scalars();
  template <class Visit>
  void for_each_scalar(const FollowedParameter& parameter, Visit visit) const;
  void read_progress(FollowedParameter& parameter);
  void write_progress() noexcept;
  void increment_versions(bool gradients_too) noexcept;
  void clear_unusual_gradients() noexcept;
  void keep_alive();
  const OccupiedMemory& occupied_memory();

  arrays::TorchTensors tensors_;
  std::deque<FollowedGroup> groups_;
  std::deque<FollowedParameter> parameters_;
  std::vector<FollowedState> state_;
  std::vector<FollowedScalar> scalars_;
  std::optional<OccupiedMemory> memory_;
  bool is_outdated_ = false;  // what was told
  bool is_resident_ = false;
  bool is_placed_ = false;  // the stepper knows which slots are resident

  // Of the step under way.
  std::vector<Update> updates_;
  std::vector<FollowedParameter*> moving_;
  std::vector<pybind11::object> unusual_gradients_;  // not cleared by clearing what the step reads
  std::vector<pybind11::object> alive_;
  std::vector<Teller::Norm> local_norms_;
};

}  // namespace fusestep::engine
