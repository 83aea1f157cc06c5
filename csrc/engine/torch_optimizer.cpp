#include "engine/torch_optimizer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "core/errors.h"
#include "cpu/borrowed_threads.h"
#include "cpu/fp_environment.h"

namespace py = pybind11;

namespace fusestep::engine {
namespace {

using Watch = WatchedDict::Watch;

// From so many on, looking at all tensors takes longer than waking a thread.
constexpr std::size_t kManyTensors = 100;

// A step settles in two or three attempts. More means that somebody changes the state meanwhile.
constexpr int kMostAttempts = 10;

// Places in the list of a rule's scalars.
constexpr std::size_t kStep = 0, kMomentumProduct = 1;

bool is_text(PyObject* key, std::string_view text) {
  if (!PyUnicode_Check(key)) return false;
  Py_ssize_t size = 0;
  const char* characters = PyUnicode_AsUTF8AndSize(key, &size);
  if (!characters) PyErr_Clear();
  return characters && std::string_view(characters, static_cast<std::size_t>(size)) == text;
}

// A number, or a tensor of one element: a scheduler may write to it at any time.
double number(const py::object& value) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  const py::object element = py::hasattr(value, "item") ? value.attr("item")() : value;
  const double result = PyFloat_AsDouble(element.ptr());
  if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

}  // namespace

// ---- being told what there is ----

void TorchOptimizer::forget() {
  pull();  // it points into parameters_, too
  stepper.keep_progress_on_gpus({});
  is_placed_ = is_outdated_ = false;
  memory_.reset();  // it points into parameters_
  stepper.forget_gradients();
  updates_.clear();
  moving_.clear();
  parameters_.clear();
  groups_.clear();
  state_.clear();
  scalars_.clear();
}

TorchOptimizer::FollowedDict::FollowedDict(const GroupOptions& options)
    : is_mutable(options.is_mutable), watched(options.dict.ptr(), [&](PyObject* key) {
        if (is_text(key, "lr")) lr_key = key;
        if (is_text(key, "params")) {
          params = PyDict_GetItem(options.dict.ptr(), key);
          return Watch::value;
        }
        return options.watched.contains(py::handle(key)) ? Watch::kept_value : Watch::key;
      }) {
  if (!lr_key || !params || !PyList_Check(params))
    throw ValueError("a parameter group lacks 'lr', or its list of 'params'");
}

void TorchOptimizer::add_group(GroupOptions options) {
  FollowedDict dict(options);
  groups_.push_back({Group{std::move(options.rule), 0, options.maximize},
                     std::move(dict),
                     {},
                     parameters_.size(),
                     parameters_.size()});
}

void TorchOptimizer::set_options(std::size_t group, GroupOptions options) {
  FollowedGroup& followed = groups_.at(group);
  followed.dict = FollowedDict(options);
  followed.group = {std::move(options.rule), 0, options.maximize};
}

void TorchOptimizer::add_parameter(Parameter parameter) {
  FollowedGroup& group = groups_.back();
  FollowedParameter& followed = parameters_.emplace_back(FollowedParameter{
      .tensor = parameter.tensor.ptr(),
      .anchor_strength = {},
      .version = {},
      .slot = Slot(std::move(parameter.name), *group.group.rule),
      .scalars = {},
      .is_ready = parameter.is_ready,
      .is_sharded = parameter.is_sharded,
      .index = parameters_.size(),
      .told = {},
  });
  if (parameter.states.size() > kMaxStates)
    throw ValueError(followed.slot.name() + " has too many state tensors");
  followed.state_count = parameter.states.size();
  const Role role = parameter.powers.empty() ? Role::state : Role::codes;
  for (const py::object& state : parameter.states) followed.add(role, state);
  for (const py::object& powers : parameter.powers) followed.add(Role::powers, powers);
  if (parameter.anchor) {
    followed.anchor_strength = parameter.anchor->strength;
    followed.add(Role::anchor, parameter.anchor->reference);
    followed.add(Role::importance, parameter.anchor->importance);
  }
  followed.add(Role::average, parameter.average);
  if (parameter.master) {
    followed.version = parameter.master->version;
    followed.add(Role::master, parameter.master->tensor);
  }
  followed.add(Role::lower_half, parameter.lower_half);
  followed.slot.history = std::move(parameter.history);
  followed.slot.block_progress = std::move(parameter.block_progress);
  followed.told.insert(followed.told.end(), parameter.scalars.begin(), parameter.scalars.end());
  followed.slot.progress.step = parameter.is_first ? 0 : 1;
  for (const auto& [tensor, element] : parameter.places)
    followed.scalars.push_back({follow_scalar(tensor), element});
  group.end = parameters_.size();
}

void TorchOptimizer::FollowedParameter::add(Role role, const py::object& tensor) {
  if (tensor.is_none()) return;
  tensors.at(tensor_count) = tensor.ptr();
  roles[tensor_count++] = role;
  told.push_back(tensor);
}

// Most parameters have theirs in the same few tensors, which come first.
std::size_t TorchOptimizer::follow_scalar(const py::object& tensor) {
  constexpr std::size_t kFew = 4;
  for (std::size_t i = 0; i < std::min(kFew, scalars_.size()); ++i)
    if (scalars_[i].tensor.is(tensor)) return i;
  scalars_.push_back({tensor, {}});
  return scalars_.size() - 1;
}

void TorchOptimizer::seal(const py::dict& state) {
  std::vector<std::string_view> names{"anchor", "anchor_importance", "average", "master",
                                      "master_low"};
  std::vector<std::string_view> scalar_names;
  std::vector<std::string> names_of_powers;
  for (const FollowedGroup& followed : groups_) {
    for (const auto name : followed.group.rule->state_names()) {
      names.push_back(name);
      names_of_powers.push_back(std::string(name) + "_powers");
    }
    for (const auto name : followed.group.rule->scalar_names()) scalar_names.push_back(name);
  }
  const auto is_among = [](PyObject* key, const auto& list) {
    return std::ranges::any_of(list, [&](std::string_view name) { return is_text(key, name); });
  };
  const auto watch = [&](PyObject* key) {
    // A scalar's tensor is not asked for its address: it is told apart for certain.
    if (is_among(key, scalar_names)) return Watch::kept_value;
    if (is_text(key, "anchor_strength")) return Watch::kept_value;
    return is_among(key, names) || is_among(key, names_of_powers) ? Watch::value : Watch::key;
  };
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    FollowedState& followed = state_.emplace_back(FollowedState{key, value, {}});
    if (PyDict_Check(value)) followed.entry.emplace(value, watch);
  }
  std::unordered_map<PyObject*, const WatchedDict*> entries;
  for (const FollowedState& followed : state_)
    if (followed.entry) entries.emplace(followed.key, &*followed.entry);
  for (FollowedParameter& parameter : parameters_) {
    const auto found = entries.find(parameter.tensor);
    parameter.is_ready =
        parameter.is_ready && std::ranges::all_of(parameter.told, [&](const py::object& object) {
          return found != entries.end() && found->second->watches(object.ptr());
        });
    if (!parameter.is_ready) {  // nothing holds
      parameter.state_count = parameter.tensor_count = 0;
      parameter.version.reset();
    }
    parameter.told.clear();
  }
}

// ---- whether it is still so ----

TorchOptimizer::Outcome TorchOptimizer::compare(py::handle groups, py::handle state) {
  if (!PyList_Check(groups.ptr()) || PyList_GET_SIZE(groups.ptr()) != std::ssize(groups_))
    return Outcome::stale;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    FollowedGroup& followed = groups_[i];
    const auto look = [&](PyObject* key, PyObject* value) {
      if (key == followed.dict.lr_key) followed.lr = py::reinterpret_borrow<py::object>(value);
    };
    PyObject* dict = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
    if (!followed.dict.watched.is_unchanged(dict, look)) return Outcome::new_options;
    if (!holds_its_parameters(followed)) return Outcome::stale;
  }
  return is_known_state(state.ptr()) ? Outcome::done : Outcome::stale;
}

bool TorchOptimizer::holds_its_parameters(const FollowedGroup& group) const {
  if (PyList_GET_SIZE(group.dict.params) != static_cast<Py_ssize_t>(group.end - group.begin))
    return false;
  for (std::size_t i = group.begin; i < group.end; ++i)
    if (PyList_GET_ITEM(group.dict.params, static_cast<Py_ssize_t>(i - group.begin)) !=
        parameters_[i].tensor)
      return false;
  return true;
}

bool TorchOptimizer::is_known_state(PyObject* state) const {
  if (!PyDict_Check(state) || PyDict_GET_SIZE(state) != std::ssize(state_)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const FollowedState& followed : state_) {
    if (!PyDict_Next(state, &position, &key, &value)) return false;
    if (key != followed.key || value != followed.value) return false;
    if (followed.entry && !followed.entry->is_unchanged(value, [](PyObject*, PyObject*) {}))
      return false;
  }
  return true;
}

// ---- a step ----

struct TorchOptimizer::StepUnderWay {
  explicit StepUnderWay(TorchOptimizer& optimizer) : optimizer(optimizer) {}
  ~StepUnderWay() {
    optimizer.updates_.clear();
    optimizer.moving_.clear();
    optimizer.unusual_gradients_.clear();
    optimizer.alive_.clear();
  }
  TorchOptimizer& optimizer;
};

void TorchOptimizer::step(py::handle groups, py::handle state, StepArguments arguments,
                          const ScalingTensors& scaling, const Selections& selections,
                          Teller& teller) {
  const Turnstile::Turn turn(turnstile);
  const cpu::IeeeEnvironment ieee;  // coefficients depend on the rounding mode, too
  const cpu::BorrowedThreads threads;
  check_is_not_swapped();
  if (updates_.capacity() >= kManyTensors) cpu::announce(stepper.elements());
  arguments.scaling = find_scaling(scaling);
  arguments.ema_decay = ema_decay();
  Outcome outcome = attempt(groups, state, arguments, selections, false);
  if (outcome == Outcome::done || outcome == Outcome::skipped) return;
  settle(outcome, true, teller, [&](Outcome before) {
    if (before == Outcome::needs_norm) arguments.norm = teller.global_norm(local_norms_);
    return attempt(teller.groups(), teller.state(), arguments, selections, true);
  });
}

void TorchOptimizer::check_is_not_swapped() const {
  if (is_swapped)
    throw std::runtime_error(
        "the averages are in the parameters' place: do this outside of "
        "`with opt.swap_averages()`");
}

// Where a callable says it; else that of the settings holds. It may do anything, so it is asked
// before anything is looked at.
std::optional<double> TorchOptimizer::ema_decay() {
  if (!ema_schedule) return std::nullopt;
  pull();
  const double decay = number(ema_schedule(stepper.steps));
  if (!(decay >= 0 && decay <= 1))
    throw ValueError("ema_decay(" + std::to_string(stepper.steps) + ") is " +
                     std::to_string(decay) + "; expected a number in [0, 1]");
  return decay;
}

// Attempts something until all is as it was told.
template <class Attempt>
void TorchOptimizer::settle(Outcome outcome, bool is_for_a_step, Teller& teller, Attempt attempt) {
  try {
    for (int attempts = 0; attempts < kMostAttempts; ++attempts) {
      if (outcome == Outcome::stale || (outcome == Outcome::new_options && !teller.tell_options()))
        teller.tell_everything(is_for_a_step);
      outcome = attempt(outcome);
      if (outcome == Outcome::done) return teller.keep();
      if (outcome == Outcome::skipped) return teller.undo();
    }
    throw std::runtime_error("the optimizer's groups or state were changed during its own step");
  } catch (...) {
    teller.undo();
    throw;
  }
}

// Everything up to the kernels may fail, or find that something is not as it was told, and has
// changed nothing then. From there on nothing throws.
TorchOptimizer::Outcome TorchOptimizer::attempt(py::handle groups, py::handle state,
                                                const StepArguments& arguments,
                                                const Selections& selections,
                                                bool options_are_new) {
  const StepUnderWay under_way(*this);
  const auto is_mutable = [](const FollowedGroup& group) { return group.dict.is_mutable; };
  if (is_outdated_) return Outcome::stale;
  if (!options_are_new && std::ranges::any_of(groups_, is_mutable)) return Outcome::new_options;
  if (const Outcome seen = compare(groups, state); seen != Outcome::done) return seen;
  tensors_.has_run_code = false;
  if (!read_rates(options_are_new)) return Outcome::stale;
  if (tensors_.has_run_code)
    if (const Outcome seen = compare(groups, state); seen != Outcome::done) return seen;
  tensors_.has_run_code = false;
  if (!collect(selections)) return Outcome::stale;
  complete_rates();
  find_streams();
  if (tensors_.has_run_code)
    if (const Outcome seen = compare(groups, state); seen != Outcome::done) return seen;

  prepare(arguments);
  place_progress();
  const auto is_sharded = [](const FollowedParameter* p) { return p->is_sharded; };
  if (stepper.settings.need_norm() && !arguments.norm && std::ranges::any_of(moving_, is_sharded)) {
    local_norms_ = gradient_norms();
    return Outcome::needs_norm;
  }
  const bool moved =
      stepper.take(updates_, arguments, [&] { increment_versions(arguments.zero_grad); });
  if (moved) write_progress();
  if (arguments.zero_grad) clear_unusual_gradients();
  return moved ? Outcome::done : Outcome::skipped;
}

// ---- rows that have missed steps ----

void TorchOptimizer::catch_up(const std::optional<RowNumbers>& numbers, Teller& teller) {
  const Turnstile::Turn turn = turnstile.turn_or_own();
  const cpu::IeeeEnvironment ieee;
  const cpu::BorrowedThreads threads;
  check_is_not_swapped();
  const auto attempt = [&](Outcome) {
    return attempt_to_catch_up(teller.groups(), teller.state(), numbers);
  };
  if (!alive_.empty())
    throw std::runtime_error("an optimizer cannot be used from inside its own step");
  const Outcome outcome = attempt(Outcome::done);
  if (outcome != Outcome::done) settle(outcome, false, teller, attempt);
}

// Like a step, wholly or not at all; but no state is made for it, and options do not matter: each
// missed step has had its own.
TorchOptimizer::Outcome TorchOptimizer::attempt_to_catch_up(
    py::handle groups, py::handle state, const std::optional<RowNumbers>& numbers) {
  const StepUnderWay under_way(*this);
  if (is_outdated_) return Outcome::stale;
  if (const Outcome seen = compare(groups, state); seen != Outcome::done) return seen;
  tensors_.has_run_code = false;
  keep_alive();
  std::vector<std::tuple<FollowedParameter*, const rules::AnyRule*, cuda::Stream>> behind;
  py::list tensors;
  for (const FollowedGroup& group : groups_) {
    for (std::size_t i = group.begin; i < group.end; ++i) {
      FollowedParameter& parameter = parameters_[i];
      const Slot& slot = parameter.slot;
      if (!slot.history || !slot.history->has_missed_steps()) continue;
      if (numbers && !numbers->at(i)) continue;
      if (!parameter.is_ready)
        throw ValueError(slot.name() + " has rows that have missed steps, and lacks the state " +
                         "that is needed to make up for these");
      follow_memory(parameter);
      if (is_outdated_) return Outcome::stale;
      follow_history(parameter);
      const bool is_on_gpu = slot.device().kind == Device::cuda;
      behind.emplace_back(&parameter, group.group.rule.get(),
                          is_on_gpu ? tensors_.current_stream(slot.device()) : 0);
      tensors.append(py::handle(parameter.tensor));
    }
  }
  if (tensors_.has_run_code)
    if (const Outcome seen = compare(groups, state); seen != Outcome::done) return seen;

  for (const auto& [parameter, rule, stream] : behind) {
    if (numbers)
      stepper.catch_up(parameter->slot, *rule, *numbers->at(parameter->index), stream);
    else
      stepper.catch_up(parameter->slot, *rule, stream);
    if (parameter->version) ++*parameter->version;
  }
  tensors_.increment_versions(tensors.ptr());
  return Outcome::done;
}

void TorchOptimizer::fetch_rate(FollowedGroup& followed) {
  if (!PyFloat_CheckExact(followed.lr.ptr())) tensors_.has_run_code = true;  // a tensor's item()
  followed.group.lr = number(followed.lr);
  check_rate(followed.group.lr);
}

// Then the host counts all steps.
bool TorchOptimizer::keeps_history() const {
  return std::ranges::any_of(parameters_, [](const FollowedParameter& parameter) {
    return parameter.slot.history != nullptr;
  });
}

// A rate on a GPU is left there, for steps to find. False where these could, and have to be told.
bool TorchOptimizer::read_rates(bool options_are_new) {
  for (FollowedGroup& followed : groups_) {
    followed.group.rate.reset();
    PyObject* lr = followed.lr.ptr();
    const auto on_gpu = PyFloat_CheckExact(lr) ? std::nullopt : tensors_.number_on_gpu(lr);
    if (on_gpu && !is_resident_ && !options_are_new && !keeps_history()) return false;
    if (on_gpu && is_resident_)
      followed.group.rate = RateOnDevice{on_gpu->device, {on_gpu->data, on_gpu->is_double}};
    else
      fetch_rate(followed);
  }
  return true;
}

// Where parameters are elsewhere than the tensor with their rate, it has to be fetched.
void TorchOptimizer::complete_rates() {
  for (FollowedGroup& followed : groups_) {
    const Group& group = followed.group;
    const auto is_elsewhere = [&](const Update& update) {
      return update.group == &group && update.slot->device() != group.rate->device;
    };
    if (group.rate && std::ranges::any_of(updates_, is_elsewhere)) fetch_rate(followed);
  }
}

// Finds the parameters that have a gradient. False where one of them lacks state.
bool TorchOptimizer::collect(const Selections& selections) {
  keep_alive();
  find_scalars();
  for (const FollowedGroup& group : groups_) {
    for (std::size_t i = group.begin; i < group.end; ++i) {
      FollowedParameter& parameter = parameters_[i];
      PyObject* const samples = selections.samples_of(parameter.tensor);
      const py::object gradient =
          samples ? py::reinterpret_borrow<py::object>(samples)
                  : py::reinterpret_steal<py::object>(tensors_.gradient_of(parameter.tensor));
      if (gradient.is_none()) continue;
      if (!parameter.is_ready) return false;
      follow_memory(parameter);
      if (is_outdated_) return false;
      if (parameter.slot.history) follow_history(parameter);
      if (parameter.slot.has_split_progress()) check_blocks(parameter.slot);
      read_progress(parameter);
      if (is_outdated_) return false;
      Slot& slot = parameter.slot;
      Update& update = updates_.emplace_back(&slot, &group.group);
      update.choice = selections.of(parameter.tensor);
      update.draw = {seed, stepper.steps, parameter.index};
      if (samples) view_samples(slot, gradient, update);
      // The next is likely to be sparse, too, and torch takes long to say that it cannot be read.
      else if (parameter.had_sparse_gradient ||
               !tensors_.view_usual_gradient(parameter.tensor, parameter.view(), gradient.ptr(),
                                             update.gradient))
        view_unusual_gradient(parameter, gradient, update);
      moving_.push_back(&parameter);
    }
  }
  if (std::ranges::any_of(updates_, &Update::has_noise)) {
    pull();  // it depends on how many steps have been taken
    for (Update& update : updates_) update.draw.step = stepper.steps;
  }
  return true;
}

void TorchOptimizer::view_samples(const Slot& slot, const py::object& samples, Update& update) {
  tensors_.has_run_code = true;
  const auto view = [&](PyObject* tensor, const arrays::Label& label) {
    return tensors_.view_samples(tensor, label);
  };
  update.take(arrays::from_samples(samples.ptr(), slot.parameter(), slot.name(), view));
}

void TorchOptimizer::view_unusual_gradient(FollowedParameter& parameter, const py::object& gradient,
                                           Update& update) {
  auto [view, row_numbers, is_copy] =
      tensors_.unusual_gradient(parameter.tensor, parameter.view(), gradient.ptr(),
                                {"the gradient of ", parameter.slot.name()});
  parameter.had_sparse_gradient = row_numbers.has_value();
  if (is_copy || row_numbers) unusual_gradients_.push_back(gradient);
  update.gradient = std::move(view);
  update.row_numbers = std::move(row_numbers);
}

bool TorchOptimizer::is_where_it_was(const FollowedParameter& parameter) const {
  if (!parameter.is_bound || !tensors_.is_at(parameter.tensor, parameter.view())) return false;
  for (std::size_t i = 0; i < parameter.tensor_count; ++i) {
    const bool is_ours = parameter.memory[i] && parameter.memory[i]->is_in_use();
    if (!is_ours && !tensors_.is_at(parameter.tensors[i], parameter.view(i))) return false;
  }
  return true;
}

const arrays::Array& TorchOptimizer::FollowedParameter::view(std::size_t i) const {
  switch (roles[i]) {
    case Role::state:
    case Role::codes: return slot.state(i);
    case Role::powers: return slot.powers(i - state_count);
    case Role::anchor: return slot.anchor_reference();
    case Role::importance: return slot.anchor_importance();
    case Role::average: return slot.average();
    case Role::lower_half: return slot.lower_half();
    case Role::master: break;
  }
  return slot.parameter();
}

const arrays::Array& TorchOptimizer::FollowedParameter::view() const {
  return version ? slot.copy() : slot.parameter();
}

// False where somebody else has written to a parameter since it was the rounding of its master.
bool TorchOptimizer::is_as_left(const FollowedParameter& parameter) const {
  return !parameter.version || tensors_.version_of(parameter.tensor) == *parameter.version;
}

bool TorchOptimizer::has_other_dtype(const FollowedParameter& parameter) {
  const arrays::Array now = tensors_.view(parameter.tensor, {"", parameter.slot.name()},
                                          arrays::Expected::complex_as_real);
  return now.dtype != parameter.view().dtype;
}

// Tells the slot where a parameter, and all that belongs to it, lies now.
void TorchOptimizer::bind(FollowedParameter& parameter) {
  Slot& slot = parameter.slot;
  using arrays::Expected;
  const auto view = [&](PyObject* tensor, const std::string& label,
                        Expected expected = Expected::complex_as_real) {
    arrays::Array array = tensors_.view(tensor, {"", label}, expected);
    array.pin();
    return array;
  };
  std::vector<arrays::Array> states, powers;
  std::optional<arrays::Array> anchor, importance, average, master, lower_half;
  for (std::size_t i = 0; i < parameter.tensor_count; ++i) {
    PyObject* const tensor = parameter.tensors[i];
    switch (parameter.roles[i]) {
      case Role::state: states.push_back(view(tensor, slot.state_label(i))); break;
      case Role::codes: states.push_back(view(tensor, slot.state_label(i), Expected::bits)); break;
      case Role::powers:
        powers.push_back(view(tensor, slot.state_label(powers.size()), Expected::bits));
        break;
      case Role::anchor: anchor = view(tensor, "the anchor of " + slot.name()); break;
      case Role::importance: importance = view(tensor, "the anchor of " + slot.name()); break;
      case Role::average: average = view(tensor, "the average of " + slot.name()); break;
      case Role::master: master = view(tensor, "the master of " + slot.name()); break;
      case Role::lower_half:
        lower_half = view(tensor, "the lower half of " + slot.name(), Expected::bits);
        break;
    }
  }
  arrays::Array itself = view(parameter.tensor, slot.name());
  slot.bind(std::move(master ? *master : itself), std::move(states), std::move(powers));
  if (anchor)
    slot.set_anchor(*parameter.anchor_strength, std::move(*anchor), std::move(importance));
  if (average) slot.set_average(std::move(*average));
  if (master) slot.set_copy(std::move(itself));
  if (lower_half) slot.set_lower_half(std::move(*lower_half));
}

// Notices where the parameter or its state has been given other memory, shape or dtype, or where
// others have written to what has a master.
void TorchOptimizer::follow_memory(FollowedParameter& parameter) {
  if (!is_as_left(parameter)) {
    is_outdated_ = true;
    return;
  }
  if (is_where_it_was(parameter)) return;
  if (parameter.is_bound && has_other_dtype(parameter)) {  // for which there may be other state
    is_outdated_ = true;
    return;
  }
  Slot& slot = parameter.slot;
  memory_.reset();
  const bool was_bound = std::exchange(parameter.is_bound, false);
  const Device device_before = slot.device();
  const std::byte* const place_before = was_bound ? parameter.view().data : nullptr;
  std::array<const std::byte*, kMaxStates> states_before{};
  for (std::size_t i = 0; was_bound && i < parameter.state_count; ++i)
    states_before[i] = slot.state(i).data;
  bind(parameter);
  for (std::size_t i = 0; i < parameter.tensor_count; ++i)
    parameter.memory[i] = arrays::StateMemory::at(parameter.view(i).data);
  parameter.is_bound = true;
  is_placed_ = false;
  // Where state has been moved, the step count may have been, too; and it may have to be. Other
  // memory of a parameter need not have the values that its master does.
  bool has_moved = was_bound && device_before != slot.device();
  if (was_bound && parameter.version)
    has_moved = has_moved || place_before != parameter.view().data;
  for (std::size_t i = 0; was_bound && i < parameter.state_count; ++i)
    has_moved = has_moved || states_before[i] != slot.state(i).data;
  is_outdated_ = is_outdated_ || has_moved;
}

// Rows that have missed steps must be where they were, with the state that they had.
void TorchOptimizer::follow_history(FollowedParameter& parameter) {
  const Slot& slot = parameter.slot;
  rules::RowHistory& history = *slot.history;
  const auto shape = slot.parameter().geometry().shape;
  const std::int64_t rows = shape.empty() ? 0 : shape[0];
  if (!history.has_missed_steps()) {
    history.mark_all();
    history.resize(rows);
  } else if (history.rows() != rows) {
    throw ValueError(slot.name() + " has been given " + std::to_string(rows) +
                     " rows where it had " + std::to_string(history.rows()) +
                     ", of which some have missed steps: use resize(), or call flush() before");
  }
  try {
    history.compute_in(slot.work.compute, slot.states());
  } catch (const ValueError& error) {
    throw ValueError(slot.name() + " has " + error.what() +
                     ": call flush() before options are changed that decide which state is kept");
  }
}

// Blocks that have come differently far must still be there.
void TorchOptimizer::check_blocks(const Slot& slot) const {
  const std::int64_t size = slot.parameter().size, expected = slot.block_progress->size();
  if (size != expected)
    throw ValueError(slot.name() + " has been given " + std::to_string(size) +
                     " elements where it had " + std::to_string(expected) +
                     ", in blocks with step counts of their own (where=): use resize()");
}

// Parameters without a gradient are not asked where they lie now.
void TorchOptimizer::follow_all_memory() {
  memory_.reset();
  for (FollowedParameter& parameter : parameters_) {
    if (!parameter.is_bound) continue;
    try {
      follow_memory(parameter);
    } catch (const TypeError&) {  // it has gone where there is no memory
    } catch (const ValueError&) {
    }
  }
}

const OccupiedMemory& TorchOptimizer::occupied_memory() {
  if (!memory_) {
    OccupiedMemory memory;
    for (const FollowedParameter& parameter : parameters_)
      if (parameter.is_bound) parameter.slot.occupy(memory);
    memory.seal();
    memory_ = std::move(memory);
  }
  return *memory_;
}

void TorchOptimizer::prepare(const StepArguments& arguments) {
  try {
    stepper.prepare(updates_, occupied_memory(), arguments);
  } catch (const ValueError&) {  // an overlap, perhaps with memory that was left long ago
    follow_all_memory();
    stepper.prepare(updates_, occupied_memory(), arguments);
  }
}

std::vector<Teller::Norm> TorchOptimizer::gradient_norms() {
  const std::vector<GradientNorm> norms = stepper.gradient_norms(updates_);
  std::vector<Teller::Norm> result;
  for (std::size_t i = 0; i < norms.size(); ++i) result.push_back({moving_[i]->index, norms[i]});
  return result;
}

// ---- scalars ----

// Notices where a tensor of scalars has been given other memory.
void TorchOptimizer::find_scalars() {
  static const std::string kName = "a tensor of step counts";
  for (auto& [tensor, view] : scalars_) {
    if (view.data && tensors_.is_at(tensor.ptr(), view)) continue;
    view = tensors_.view(tensor.ptr(), {"", kName});
    view.pin();
    if (!view.c_contiguous || (view.dtype != DType::float32 && view.dtype != DType::float64))
      throw ValueError(kName + " is not a contiguous tensor of float32 or float64");
  }
}

// Calls visit(number of the scalar, element) for each scalar of a parameter, in the rule's order.
template <class Visit>
void TorchOptimizer::for_each_scalar(const FollowedParameter& parameter, Visit visit) const {
  for (std::size_t i = 0; i < parameter.scalars.size(); ++i) {
    const auto [tensor, element] = parameter.scalars[i];
    const arrays::Array& view = scalars_[tensor].view;
    if (view.dtype == DType::float64)
      visit(i, reinterpret_cast<double*>(view.data)[element]);
    else
      visit(i, reinterpret_cast<float*>(view.data)[element]);
  }
}

// What the tensors say counts: users may write to them. But a float32 cannot count beyond 2^24.
void TorchOptimizer::read_progress(FollowedParameter& parameter) {
  if (is_resident(parameter)) return find_resident_scalars(parameter);
  if (!has_scalars_here(parameter)) {
    is_outdated_ = true;  // they have been moved to a GPU
    return;
  }
  rules::Progress& progress = parameter.slot.progress;
  // Where there is no such count, that of the optimizer is what rounding depends on: it is saved.
  if (parameter.scalars.empty() && progress.step > 0 && !parameter.slot.history)
    progress.step = std::max<std::int64_t>(1, stepper.steps);
  for_each_scalar(parameter, [&](std::size_t scalar, const auto& element) {
    using T = std::decay_t<decltype(element)>;
    if (scalar == kMomentumProduct) progress.momentum_product = element;
    if (scalar != kStep || element == static_cast<T>(progress.step)) return;
    if (!(element >= 0 && element <= 0x1p53 && element == std::floor(element)))
      throw ValueError("the step of " + parameter.slot.name() + " is " + std::to_string(element) +
                       "; expected a whole number from 0 to 2**53");
    progress.step = static_cast<std::int64_t>(element);
  });
}

bool TorchOptimizer::has_scalars_here(const FollowedParameter& parameter) const {
  return std::ranges::all_of(parameter.scalars, [&](const ScalarPlace& place) {
    return scalars_[place.tensor].view.device.kind == Device::cpu;
  });
}

void TorchOptimizer::write_progress() noexcept {
  try {
    find_scalars();  // other threads may have run
  } catch (...) {
    return;  // and have taken them away
  }
  for (const FollowedParameter* parameter : moving_) {
    if (is_resident(*parameter) || !has_scalars_here(*parameter)) continue;
    const rules::Progress& progress = parameter->slot.progress;
    for_each_scalar(*parameter, [&](std::size_t scalar, auto& element) {
      using T = std::decay_t<decltype(element)>;
      element = scalar == kStep ? static_cast<T>(progress.step)
                                : static_cast<T>(progress.momentum_product);
    });
  }
}

// ---- on GPUs ----

bool TorchOptimizer::is_resident(const FollowedParameter& parameter) const {
  return is_resident_ && parameter.slot.device().kind == Device::cuda;
}

std::vector<TorchOptimizer::Unused> TorchOptimizer::unused() {
  pull();
  std::vector<Unused> unused;
  for (const FollowedParameter& parameter : parameters_)
    if (parameter.is_bound && is_resident(parameter) && parameter.slot.progress.step == 0)
      unused.push_back(
          {parameter.tensor,
           {parameter.tensors.begin(),
            parameter.tensors.begin() + static_cast<std::ptrdiff_t>(parameter.state_count)}});
  return unused;
}

void TorchOptimizer::find_resident_scalars(FollowedParameter& parameter) const {
  Slot::Resident& resident = parameter.slot.resident;
  for (std::size_t i = 0; i < parameter.scalars.size(); ++i) {
    const auto [tensor, element] = parameter.scalars[i];
    const arrays::Array& view = scalars_[tensor].view;
    if (view.device != parameter.slot.device())
      throw ValueError("the step count of " + parameter.slot.name() + " is on " +
                       name_of(view.device) + "; expected " + name_of(parameter.slot.device()));
    const auto offset = static_cast<std::int64_t>(element) * item_size(view.dtype);
    (i == kStep ? resident.step : resident.momentum_product) = {view.data + offset,
                                                                view.dtype == DType::float64};
  }
}

// Tells the stepper whose progress is on a GPU. What has happened there so far is fetched first.
void TorchOptimizer::place_progress() {
  if (is_placed_) return;
  pull();
  std::vector<Slot*> slots;
  for (FollowedParameter& parameter : parameters_)
    if (parameter.is_bound && is_resident(parameter)) slots.push_back(&parameter.slot);
  stepper.keep_progress_on_gpus(slots);
  is_placed_ = true;
}

void TorchOptimizer::find_streams() {
  std::vector<std::pair<Device, cuda::Stream>> streams;
  for (Update& update : updates_) {
    const Device& device = update.slot->device();
    if (device.kind == Device::cpu) continue;
    auto found = std::ranges::find(streams, device, [](const auto& pair) { return pair.first; });
    if (found == streams.end())
      found = streams.insert(streams.end(), {device, tensors_.current_stream(device)});
    update.stream = update.gradient.stream = found->second;
  }
}

Scaling TorchOptimizer::find_scaling(const ScalingTensors& scaling) const {
  const auto find = [&](const py::object& tensor) -> const float* {
    if (tensor.is_none()) return nullptr;
    const auto number = tensors_.number_on_gpu(tensor.ptr());
    if (!number || number->is_double)
      throw TypeError("grad_scale and found_inf must be float32 tensors of one element on the GPU");
    return reinterpret_cast<const float*>(number->data);
  };
  return {find(scaling.loss_scale), find(scaling.found_inf)};
}

void TorchOptimizer::pull() {
  const Turnstile::Turn turn = turnstile.turn_or_own();
  stepper.pull([&](const Device& device) { return tensors_.current_stream(device); });
}

std::int64_t TorchOptimizer::steps() {
  pull();
  return stepper.steps;
}

std::int64_t TorchOptimizer::skipped_steps() {
  pull();
  return stepper.skipped_steps;
}

// ---- around the kernels ----

// A group that moves as a whole hands over its own list, if no other thread can have changed it.
void TorchOptimizer::increment_versions(bool gradients_too) noexcept {
  const bool lists_may_have_changed =
      stepper.is_on_gpus() || (stepper.settings.need_norm() && stepper.will_release_gil());
  auto moving = moving_.begin();
  for (const FollowedGroup& group : groups_) {
    const auto first = moving;
    for (; moving != moving_.end() && (*moving)->index < group.end; ++moving)
      if ((*moving)->version) ++*(*moving)->version;
    if (moving == first) continue;
    if (moving - first == static_cast<std::ptrdiff_t>(group.end - group.begin) &&
        !lists_may_have_changed) {
      tensors_.increment_versions(group.dict.params);
      continue;
    }
    py::list tensors;
    for (auto parameter = first; parameter != moving; ++parameter)
      tensors.append(py::handle((*parameter)->tensor));
    tensors_.increment_versions(tensors.ptr());
  }
  if (gradients_too) {
    py::list gradients;
    for (const Update& update : updates_) gradients.append(py::handle(update.gradient.owner()));
    tensors_.increment_versions(gradients.ptr());
  }
}

void TorchOptimizer::clear_unusual_gradients() noexcept {
  for (const py::object& gradient : unusual_gradients_) tensors_.clear_gradient(gradient.ptr());
}

// From here on, code of others may run: of a tensor subclass, or of another thread. It may replace
// what this step works on.
void TorchOptimizer::keep_alive() {
  for (const FollowedParameter& parameter : parameters_) {
    alive_.push_back(py::reinterpret_borrow<py::object>(parameter.tensor));
    for (std::size_t i = 0; i < parameter.tensor_count; ++i)
      alive_.push_back(py::reinterpret_borrow<py::object>(parameter.tensors[i]));
  }
}

}  // namespace fusestep::engine
