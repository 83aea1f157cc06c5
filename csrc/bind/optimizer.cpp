#include "engine/optimizer.h"

#include <pybind11/stl.h>

#include "bind/register.h"
#include "bind/selections.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::bind {
namespace {

using engine::Optimizer;
using engine::StepArguments;
using Options = std::map<std::string, double>;

std::vector<PyObject*> pointers(const py::sequence& objects) {
  std::vector<PyObject*> result;  // borrowed from the sequence, a list or tuple of Python's
  for (const py::handle object : objects) result.push_back(object.ptr());
  return result;
}

std::unique_ptr<Optimizer> make_optimizer(const std::string& rule, const Options& options,
                                          const std::vector<std::string>& names,
                                          const py::list& parameters, const py::list& states) {
  auto optimizer = std::make_unique<Optimizer>(make_rule(rule, options));
  for (std::size_t i = 0; i < names.size(); ++i)
    optimizer->add(names[i], py::handle(parameters[i]).ptr(), pointers(states[i].cast<py::list>()));
  optimizer->seal();
  return optimizer;
}

// pybind11 would list every signature where a sentence helps more.
double number(const char* name, PyObject* object) {
  const double value = PyBool_Check(object) ? -1 : PyFloat_AsDouble(object);
  if (!PyBool_Check(object) && !(value == -1 && PyErr_Occurred())) return value;
  PyErr_Clear();
  throw TypeError(std::string(name) + " is a " + Py_TYPE(object)->tp_name + "; expected a number");
}

bool flag(const char* name, PyObject* object) {
  if (object == Py_True || object == Py_False) return object == Py_True;
  const std::string_view type = Py_TYPE(object)->tp_name;
  if (type == "numpy.bool" || type == "numpy.bool_") return PyObject_IsTrue(object) == 1;
  throw TypeError(std::string(name) + " is a " + Py_TYPE(object)->tp_name +
                  "; expected True or False");
}

// One selection for each parameter (None: all of it), or None for all of all. `keep` owns them.
Optimizer::Choices choices(const py::object& where, py::tuple& keep) {
  Optimizer::Choices result;
  if (where.is_none()) return result;
  keep = py::tuple(where);
  for (const py::handle one : keep)
    result.push_back(one.is_none() ? nullptr : &one.cast<const Where&>().choice);
  return result;
}

void step(Optimizer& optimizer, const py::handle& gradients, const py::handle& lr,
          const py::handle& grad_scale, const py::handle& zero_grad, const py::object& where,
          std::optional<double> ema_decay) {
  PyObject* sequence = gradients.ptr();
  if (!PyList_Check(sequence) && !PyTuple_Check(sequence))
    throw TypeError(std::string("gradients are a ") + Py_TYPE(sequence)->tp_name +
                    "; expected a list or tuple with one array (or None) for each parameter");
  const auto rate = lr.is_none() ? std::nullopt : std::optional(number("lr", lr.ptr()));
  const StepArguments arguments{.grad_scale = number("grad_scale", grad_scale.ptr()),
                                .zero_grad = flag("zero_grad", zero_grad.ptr()),
                                .ema_decay = ema_decay};
  // A copy of the references: another thread may change the list while a custom array exports
  // itself.
  const auto fixed = py::reinterpret_steal<py::object>(PySequence_Tuple(sequence));
  if (!fixed) throw py::error_already_set();
  py::tuple keep;
  optimizer.step(PySequence_Fast_ITEMS(fixed.ptr()),
                 static_cast<std::size_t>(PyTuple_GET_SIZE(fixed.ptr())), rate, arguments,
                 choices(where, keep));
}

// One array of row numbers for each parameter, or None.
void catch_up(Optimizer& optimizer, const py::sequence& indices) {
  Optimizer::RowNumbers numbers;
  for (const py::handle array : indices) {
    auto& rows = numbers.emplace_back();
    if (array.is_none()) continue;
    static const arrays::Array kNone;  // of one array too many, which is refused later
    const std::size_t i = numbers.size() - 1;
    const arrays::Array& parameter = i < optimizer.size() ? optimizer.slot(i).parameter() : kNone;
    rows = read_row_numbers(array, parameter);
  }
  optimizer.catch_up(numbers);
}

py::object missed_steps_of(Optimizer& optimizer, std::size_t i) {
  const rules::RowHistory* history = optimizer.slot(i).history.get();
  return history ? missed_steps(*history) : py::none();
}

void set_missed_steps(Optimizer& optimizer, std::size_t i, const RowNumbers& missed,
                      const std::vector<std::vector<double>>& steps) {
  engine::Slot& slot = optimizer.slot(i);
  if (!slot.history) return;  // no rows
  restore(*slot.history, *optimizer.group_of(i).rule, slot.work.compute, slot.states(), missed,
          steps);
}

py::object block_progress_of(Optimizer& optimizer, std::size_t i) {
  return block_progress(optimizer.slot(i).block_progress.get());
}

void set_block_progress(Optimizer& optimizer, std::size_t i, std::int64_t block,
                        const std::vector<std::uint32_t>& steps,
                        const std::vector<double>& products) {
  engine::Slot& slot = optimizer.slot(i);
  slot.block_progress = std::make_shared<rules::BlockProgress>();
  slot.block_progress->restore(slot.parameter().size, block, steps, products);
}

// (names of state arrays, names of scalars, initial value of the state) with these options.
py::tuple describe_rule(const std::string& name, const Options& options) {
  const auto rule = make_rule(name, options);
  const auto strings = [](const std::vector<std::string_view>& names) {
    return std::vector<std::string>(names.begin(), names.end());
  };
  return py::make_tuple(strings(rule->state_names()), strings(rule->scalar_names()),
                        rule->initial_state());
}

// Whether each of its state arrays may be negative.
std::vector<bool> state_signs(const std::string& name, const Options& options) {
  const auto rule = make_rule(name, options);
  std::vector<bool> signs;
  for (std::size_t i = 0; i < rule->state_names().size(); ++i) signs.push_back(rule->is_signed(i));
  return signs;
}

// One step of arrays whose state the caller keeps; returns the momentum product after it.
double apply(const std::string& rule, const Options& options, const py::object& parameter,
             const py::object& gradient, const py::list& states, std::int64_t step,
             double momentum_product, double lr, double grad_scale, bool maximize) {
  if (step < 1)
    throw ValueError("step is " + std::to_string(step) +
                     "; expected the number of this update, counted from 1");
  Optimizer optimizer(make_rule(rule, options));
  optimizer.add("the parameter", parameter.ptr(), pointers(states));
  optimizer.group.maximize = maximize;
  optimizer.set_progress(0, {step - 1, momentum_product});
  PyObject* gradients[] = {gradient.ptr()};
  optimizer.step(gradients, 1, lr, {.grad_scale = grad_scale});
  return optimizer.progress(0).momentum_product;
}

}  // namespace

std::unique_ptr<rules::AnyRule> make_rule(const std::string& name, const Options& options) {
  auto rule = rules::make_rule(name);
  for (const auto& [option, value] : options) rule->set(option, value);
  return rule;
}

void register_optimizer(py::module_& module) {
  using namespace py::literals;
  py::class_<Optimizer>(module, "Optimizer")
      .def(py::init(&make_optimizer), "rule"_a, "options"_a, "names"_a, "parameters"_a, "states"_a)
      .def("step", &step, "gradients"_a, "lr"_a, "grad_scale"_a, "zero_grad"_a,
           "where"_a = py::none(), "ema_decay"_a = py::none())
      .def(
          "set_option",
          [](Optimizer& self, const std::string& name, double value) {
            self.set_option(name, value);
          },
          "name"_a, "value"_a)
      .def("check_memory", &Optimizer::seal)
      .def("exempt_from_decay", &Optimizer::exempt_from_decay, "index"_a)
      .def(
          "set_average",
          [](Optimizer& self, std::size_t i, const py::object& average) {
            self.set_average(i, average.ptr());
          },
          "index"_a, "average"_a)
      .def(
          "set_copy",
          [](Optimizer& self, std::size_t i, const py::object& copy) {
            self.set_copy(i, copy.ptr());
          },
          "index"_a, "copy"_a)
      .def(
          "set_lower_half",
          [](Optimizer& self, std::size_t i, const py::object& lower_half) {
            self.set_lower_half(i, lower_half.ptr());
          },
          "index"_a, "lower_half"_a)
      .def("keep_history", &Optimizer::keep_history)
      .def("catch_up", &catch_up, "indices"_a)
      .def("flush", &Optimizer::flush)
      .def(
          "move",
          [](Optimizer& self, std::size_t i, const py::object& parameter, const py::list& states) {
            self.move(i, parameter.ptr(), pointers(states));
          },
          "index"_a, "parameter"_a, "states"_a)
      .def(
          "set_anchor",
          [](Optimizer& self, std::size_t i, double lambda, const py::object& reference,
             const py::object& importance) {
            self.set_anchor(i, lambda, reference.ptr(), importance.ptr());
          },
          "index"_a, "strength"_a, "reference"_a, "importance"_a)
      .def("release_anchor", &Optimizer::release_anchor, "index"_a)
      .def("missed_steps", &missed_steps_of, "index"_a)
      .def("block_progress", &block_progress_of, "index"_a)
      .def("set_block_progress", &set_block_progress, "index"_a, "block"_a, "steps"_a, "products"_a)
      .def_readwrite("seed", &Optimizer::seed)
      .def_readwrite("is_swapped", &Optimizer::is_swapped)
      .def("set_missed_steps", &set_missed_steps, "index"_a, "missed"_a, "steps"_a)
      .def("make_capturable", &Optimizer::make_capturable)
      .def("set_rate", &Optimizer::set_rate, "lr"_a)
      .def(
          "progress",
          [](Optimizer& self, std::size_t i) {
            const rules::Progress progress = self.progress(i);
            return py::make_tuple(progress.step, progress.momentum_product);
          },
          "index"_a)
      .def(
          "set_progress",
          [](Optimizer& self, std::size_t i, std::int64_t step, double momentum_product) {
            self.set_progress(i, {step, momentum_product});
          },
          "index"_a, "step"_a, "momentum_product"_a)
      .def(
          "exclusively",
          [](Optimizer& self, const py::function& function) {
            const engine::Turnstile::Turn turn(self.turnstile);
            return function();
          },
          "function"_a)
      .def_property(
          "maximize", [](const Optimizer& self) { return self.group.maximize; },
          &Optimizer::set_maximize)
      .def_property(
          "skip_nonfinite",
          [](const Optimizer& self) { return self.stepper.settings.skip_nonfinite; },
          &Optimizer::set_skip_nonfinite)
      .def_property(
          "max_norm", [](const Optimizer& self) { return self.stepper.settings.max_norm; },
          [](Optimizer& self, std::optional<double> value) {
            self.stepper.settings.max_norm = value;
          })
      .def_property(
          "clip_value", [](const Optimizer& self) { return self.stepper.settings.clip_value; },
          [](Optimizer& self, std::optional<double> value) {
            self.stepper.settings.clip_value = value;
          })
      .def_property(
          "ema_decay", [](const Optimizer& self) { return self.stepper.settings.ema_decay; },
          [](Optimizer& self, double value) { self.stepper.settings.ema_decay = value; })
      .def_property(
          "stochastic_rounding",
          [](const Optimizer& self) { return self.stepper.settings.stochastic_rounding; },
          [](Optimizer& self, bool value) { self.stepper.settings.stochastic_rounding = value; })
      .def_property_readonly("steps", &Optimizer::steps)
      .def_property_readonly("skipped_steps", &Optimizer::skipped_steps)
      .def("set_counts", &Optimizer::set_counts, "steps"_a, "skipped_steps"_a);

  module.def(
      "option_names",
      [](const std::string& rule) {
        const std::vector<std::string_view> names = make_rule(rule, {})->option_names();
        return std::vector<std::string>(names.begin(), names.end());
      },
      "rule"_a);
  module.def("state_signs", &state_signs, "rule"_a, "options"_a);
  module.def("describe_rule", &describe_rule, "rule"_a, "options"_a);
  module.def("apply", &apply, "rule"_a, "options"_a, "parameter"_a, "gradient"_a, "states"_a,
             "step"_a, "momentum_product"_a, "lr"_a, "grad_scale"_a, "maximize"_a);
}

}  // namespace fusestep::bind
