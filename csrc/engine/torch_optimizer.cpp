#include "engine/torch_optimizer.h"

#include <algorithm>
#include <cmath>
#include <string_view>
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

bool is_text(PyObject* key, std::string_view text) {
  if (!PyUnicode_Check(key)) return false;
  Py_ssize_t size = 0;
  const char* characters = PyUnicode_AsUTF8AndSize(key, &size);
  if (!characters) PyErr_Clear();
  return characters && std::string_view(characters, static_cast<std::size_t>(size)) == text;
}

// A number, or a tensor of one element: a scheduler may write to it at any time.
double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  py::object element = py::reinterpret_borrow<py::object>(value);
  if (py::hasattr(element, "item")) element = element.attr("item")();
  const double result = PyFloat_AsDouble(element.ptr());
  if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

}  // namespace

// ---- being told what there is
// --------------------------------------------------------------------

void TorchOptimizer::forget() {
  const Turnstile::Turn turn(turnstile);
  memory_.reset();  // it points into parameters_
  stepper.forget_gradients();
  parameters_.clear();
  groups_.clear();
  state_.clear();
  scalars_.clear();
}

TorchOptimizer::FollowedDict::FollowedDict(const py::dict& dict, const py::set& options)
    : watched(dict.ptr(), [&](PyObject* key) {
        if (is_text(key, "lr")) lr_key = key;
        if (is_text(key, "params")) {
          params = PyDict_GetItem(dict.ptr(), key);
          return Watch::value;
        }
        return options.contains(py::handle(key)) ? Watch::kept_value : Watch::key;
      }) {
  if (!lr_key || !params || !PyList_Check(params))
    throw ValueError("a parameter group lacks 'lr', or its list of 'params'");
}

void TorchOptimizer::add_group(const py::dict& dict, std::unique_ptr<rules::AnyRule> rule,
                               bool maximize, const py::set& options) {
  const Turnstile::Turn turn(turnstile);
  groups_.push_back({Group{std::move(rule), 0, maximize}, FollowedDict(dict, options),
                     parameters_.size(), parameters_.size()});
}

void TorchOptimizer::set_options(std::size_t group, const py::dict& dict,
                                 std::unique_ptr<rules::AnyRule> rule, bool maximize,
                                 const py::set& options) {
  const Turnstile::Turn turn(turnstile);
  FollowedGroup& followed = groups_.at(group);
  followed.dict = FollowedDict(dict, options);
  followed.group = {std::move(rule), 0, maximize};
}

void TorchOptimizer::add_parameter(Parameter parameter) {
  const Turnstile::Turn turn(turnstile);
  FollowedGroup& group = groups_.back();
  FollowedParameter& followed = parameters_.emplace_back(FollowedParameter{
      .tensor = parameter.tensor,
      .states = {},
      .slot = Slot(std::move(parameter.name), group.group.rule->state_names()),
      .scalars = parameter.scalars,
      .is_ready = parameter.is_ready,
      .is_sharded = parameter.is_sharded,
      .index = parameters_.size(),
  });
  if (parameter.states.size() > followed.states.size())
    throw ValueError(followed.slot.name() + " has too many state tensors");
  std::ranges::copy(parameter.states, followed.states.begin());
  followed.state_count = parameter.states.size();
  followed.slot.progress.step = parameter.updates;
  group.end = parameters_.size();
}

void TorchOptimizer::seal(const py::dict& state, const std::vector<py::object>& scalars) {
  const Turnstile::Turn turn(turnstile);
  std::vector<std::string_view> names;
  for (const FollowedGroup& followed : groups_) {
    const rules::AnyRule& rule = *followed.group.rule;
    for (const auto& list : {rule.state_names(), rule.scalar_names()})
      names.insert(names.end(), list.begin(), list.end());
  }
  const auto watch = [&](PyObject* key) {
    const bool watched =
        std::ranges::any_of(names, [&](std::string_view name) { return is_text(key, name); });
    return watched ? Watch::value : Watch::key;
  };
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    FollowedState& followed = state_.emplace_back(FollowedState{key, value, {}});
    if (PyDict_Check(value)) followed.entry.emplace(value, watch);
  }
  for (const py::object& tensor : scalars) scalars_.push_back({tensor, {}});
}

// ---- whether it is still so
// ----------------------------------------------------------------------

Outcome TorchOptimizer::look_at(PyObject* groups, PyObject* state) {
  if (!PyList_Check(groups) || PyList_GET_SIZE(groups) != std::ssize(groups_))
    return Outcome::stale;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    FollowedGroup& followed = groups_[i];
    py::object lr;
    const auto look = [&](PyObject* key, PyObject* value) {
      if (key == followed.dict.lr_key) lr = py::reinterpret_borrow<py::object>(value);
    };
    PyObject* dict = PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i));
    if (!followed.dict.watched.is_unchanged(dict, look)) return Outcome::new_options;
    if (!holds_its_parameters(followed)) return Outcome::stale;
    followed.group.lr = number(lr.ptr());
    check_rate(followed.group.lr);
  }
  return is_known_state(state) ? Outcome::done : Outcome::stale;
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

// ---- a step
// --------------------------------------------------------------------------------------

struct TorchOptimizer::StepUnderWay {
  explicit StepUnderWay(TorchOptimizer& optimizer) : optimizer(optimizer) {}
  ~StepUnderWay() {
    optimizer.updates_.clear();
    optimizer.moving_.clear();
    optimizer.copied_gradients_.clear();
    optimizer.alive_.clear();
  }
  TorchOptimizer& optimizer;
};

Outcome TorchOptimizer::step(PyObject* groups, PyObject* state, const StepArguments& arguments) {
  const Turnstile::Turn turn(turnstile);
  const cpu::IeeeEnvironment ieee;  // coefficients depend on the rounding mode, too
  const cpu::BorrowedThreads threads;
  const StepUnderWay under_way(*this);
  if (updates_.capacity() >= kManyTensors) cpu::announce(stepper.elements());
  if (const Outcome seen = look_at(groups, state); seen != Outcome::done) return seen;
  if (!collect()) return Outcome::stale;
  const auto is_sharded = [](const FollowedParameter* p) { return p->is_sharded; };
  if (stepper.settings.need_norm() && !arguments.norm && std::ranges::any_of(moving_, is_sharded))
    return Outcome::needs_norm;

  stepper.prepare(updates_, occupied_memory(), arguments);
  if (stepper.will_release_gil()) keep_alive();
  const bool moved = stepper.take(updates_, arguments, [this] { increment_versions(); });
  if (moved) write_progress();
  if (arguments.zero_grad)
    for (const py::object& gradient : copied_gradients_) gradient.attr("zero_")();
  return moved ? Outcome::done : Outcome::skipped;
}

std::optional<std::vector<TorchOptimizer::Norm>> TorchOptimizer::gradient_norms(PyObject* groups,
                                                                                PyObject* state) {
  const Turnstile::Turn turn(turnstile);
  const cpu::IeeeEnvironment ieee;
  const StepUnderWay under_way(*this);
  if (look_at(groups, state) != Outcome::done || !collect()) return std::nullopt;
  stepper.prepare(updates_, occupied_memory(), {});
  const std::vector<cpu::GradientNorm> norms = stepper.gradient_norms();
  std::vector<Norm> result;
  for (std::size_t i = 0; i < norms.size(); ++i) result.push_back({moving_[i]->index, norms[i]});
  return result;
}

// Finds the parameters that have a gradient. False where one of them lacks state.
bool TorchOptimizer::collect() {
  find_scalars();
  for (const FollowedGroup& group : groups_) {
    for (std::size_t i = group.begin; i < group.end; ++i) {
      FollowedParameter& parameter = parameters_[i];
      const auto gradient =
          py::reinterpret_steal<py::object>(tensors_.gradient_of(parameter.tensor));
      if (gradient.is_none()) continue;
      if (!parameter.is_ready) return false;
      follow_memory(parameter);
      read_progress(parameter);
      Slot& slot = parameter.slot;
      Update& update = updates_.emplace_back(&slot, &group.group);
      if (tensors_.view_gradient(parameter.tensor, slot.parameter(), gradient.ptr(),
                                 {"the gradient of ", slot.name()}, update.gradient))
        copied_gradients_.push_back(gradient);
      moving_.push_back(&parameter);
    }
  }
  return true;
}

bool TorchOptimizer::is_where_it_was(const FollowedParameter& parameter) const {
  if (!parameter.is_bound || !tensors_.is_at(parameter.tensor, parameter.slot.parameter()))
    return false;
  for (std::size_t i = 0; i < parameter.state_count; ++i) {
    const bool is_ours = parameter.state_memory[i] && parameter.state_memory[i]->is_in_use();
    if (!is_ours && !tensors_.is_at(parameter.states[i], parameter.slot.state(i))) return false;
  }
  return true;
}

// Notices where the parameter or its state has been given other memory, shape or dtype.
void TorchOptimizer::follow_memory(FollowedParameter& parameter) {
  if (is_where_it_was(parameter)) return;
  Slot& slot = parameter.slot;
  memory_.reset();
  const auto view = [&](PyObject* tensor, const std::string& label) {
    arrays::Array array = tensors_.view(tensor, {"", label});
    array.pin();
    return array;
  };
  std::vector<arrays::Array> states;
  for (std::size_t i = 0; i < parameter.state_count; ++i)
    states.push_back(view(parameter.states[i], slot.state_label(i)));
  slot.bind(view(parameter.tensor, slot.name()), std::move(states));
  for (std::size_t i = 0; i < parameter.state_count; ++i)
    parameter.state_memory[i] = arrays::StateMemory::at(slot.state(i).data);
  parameter.is_bound = true;
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

// Notices where a tensor of scalars has been given other memory.
void TorchOptimizer::find_scalars() {
  static const std::string kName = "the tensor of step counts";
  for (auto& [tensor, view] : scalars_) {
    if (view.data && tensors_.is_at(tensor.ptr(), view)) continue;
    view = tensors_.view(tensor.ptr(), {"", kName});
    view.pin();
    if (view.geometry().shape.size() != 1 || !view.c_contiguous ||
        (view.dtype != DType::float32 && view.dtype != DType::float64))
      throw ValueError(kName + " is not a contiguous tensor of float32 or float64");
  }
}

// Calls visit(number of the scalar, element) for each scalar of a parameter, in the rule's order.
template <class Visit>
void TorchOptimizer::for_each_scalar(const FollowedParameter& parameter, Visit visit) const {
  if (!parameter.scalars) return;
  for (std::size_t i = 0; i < scalars_.size(); ++i) {
    const arrays::Array& view = scalars_[i].view;
    if (view.dtype == DType::float64)
      visit(i, reinterpret_cast<double*>(view.data)[*parameter.scalars]);
    else
      visit(i, reinterpret_cast<float*>(view.data)[*parameter.scalars]);
  }
}

// What the tensors say counts: users may write to them. But a float32 cannot count beyond 2^24.
void TorchOptimizer::read_progress(FollowedParameter& parameter) {
  rules::Progress& progress = parameter.slot.progress;
  for_each_scalar(parameter, [&](std::size_t scalar, const auto& element) {
    using T = std::decay_t<decltype(element)>;
    if (scalar == 1) progress.momentum_product = element;
    if (scalar != 0 || element == static_cast<T>(progress.step)) return;
    if (!(element >= 0 && element <= 0x1p53 && element == std::floor(element)))
      throw ValueError("the step of " + parameter.slot.name() + " is " + std::to_string(element) +
                       "; expected a whole number from 0 to 2**53");
    progress.step = static_cast<std::int64_t>(element);
  });
}

void TorchOptimizer::write_progress() {
  find_scalars();  // other threads may have run
  for (const FollowedParameter* parameter : moving_) {
    const rules::Progress& progress = parameter->slot.progress;
    for_each_scalar(*parameter, [&](std::size_t scalar, auto& element) {
      using T = std::decay_t<decltype(element)>;
      element =
          scalar == 0 ? static_cast<T>(progress.step) : static_cast<T>(progress.momentum_product);
    });
  }
}

// A group that moves as a whole hands over its own list.
void TorchOptimizer::increment_versions() const noexcept {
  auto moving = moving_.begin();
  for (const FollowedGroup& group : groups_) {
    const auto first = moving;
    while (moving != moving_.end() && (*moving)->index < group.end) ++moving;
    const std::size_t count = static_cast<std::size_t>(moving - first);
    if (count == 0) continue;
    if (count == group.end - group.begin) {
      tensors_.increment_versions(group.dict.params);
      continue;
    }
    py::list tensors(count);
    for (std::size_t i = 0; i < count; ++i)
      tensors[i] =
          py::reinterpret_borrow<py::object>(first[static_cast<std::ptrdiff_t>(i)]->tensor);
    tensors_.increment_versions(tensors.ptr());
  }
}

// While the GIL is released, another thread may replace tensors that this step works on.
void TorchOptimizer::keep_alive() {
  for (const FollowedParameter* parameter : moving_) {
    alive_.push_back(py::reinterpret_borrow<py::object>(parameter->tensor));
    for (std::size_t i = 0; i < parameter->state_count; ++i)
      alive_.push_back(py::reinterpret_borrow<py::object>(parameter->states[i]));
  }
}

}  // namespace fusestep::engine
