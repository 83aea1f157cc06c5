#include <pybind11/stl.h>

#include "arrays/state_memory.h"
#include "bind/register.h"
#include "bind/selections.h"
#include "engine/torch_optimizer.h"

namespace py = pybind11;

namespace fusestep::bind {
namespace {

using engine::TorchOptimizer;
using Options = std::map<std::string, double>;

// The methods of a fusestep.torch.Optimizer that its native half calls.
class PythonTeller final : public engine::Teller {
 public:
  explicit PythonTeller(py::handle optimizer) : optimizer_(optimizer) {}

  py::object groups() override { return optimizer_.attr("param_groups"); }
  py::object state() override { return optimizer_.attr("state"); }
  void tell_everything(bool is_for_a_step) override {
    optimizer_.attr("_tell_everything")(is_for_a_step);
  }
  bool tell_options() override { return optimizer_.attr("_tell_options")().cast<bool>(); }
  void undo() override { optimizer_.attr("_undo")(); }
  void keep() override { optimizer_.attr("_keep")(); }

  GradientNorm global_norm(const std::vector<Norm>& norms) override {
    py::list list;
    for (const auto& [parameter, norm] : norms)
      list.append(py::make_tuple(parameter, norm.value, norm.finite));
    const auto [value, finite] =
        optimizer_.attr("_global_norm")(list).cast<std::pair<double, bool>>();
    return {value, finite};
  }

 private:
  py::handle optimizer_;
};

void step(TorchOptimizer& self, const py::handle& optimizer, const py::handle& groups,
          const py::handle& state, double grad_scale, bool zero_grad, const py::object& loss_scale,
          const py::object& found_inf, const std::vector<std::pair<py::object, py::object>>& where,
          const std::vector<std::pair<py::object, py::object>>& samples) {
  TorchOptimizer::Selections selections;
  for (const auto& [tensor, one] : samples) selections.samples.emplace(tensor.ptr(), one.ptr());
  for (const auto& [tensor, selection] : where)
    selections.choices.emplace(tensor.ptr(), &selection.cast<const Where&>().choice);
  PythonTeller teller(optimizer);
  self.step(groups, state, {.grad_scale = grad_scale, .zero_grad = zero_grad},
            {loss_scale, found_inf}, selections, teller);
}

// `indices` are an array of row numbers, or None, for each parameter; or None for all rows of all.
void catch_up(TorchOptimizer& self, const py::handle& optimizer,
              const std::optional<py::list>& indices) {
  std::optional<TorchOptimizer::RowNumbers> numbers;
  if (indices) numbers.emplace();
  if (indices)
    for (const py::handle array : *indices)
      numbers->push_back(array.is_none() ? std::nullopt : std::optional(read_row_numbers(array)));
  PythonTeller teller(optimizer);
  self.catch_up(numbers, teller);
}

// A number, or a callable from the number of steps taken to one.
void set_ema_decay(TorchOptimizer& self, const py::object& decay) {
  const bool is_schedule = PyCallable_Check(decay.ptr()) != 0;
  if (!is_schedule) self.stepper.settings.ema_decay = decay.cast<double>();
  self.ema_schedule = is_schedule ? decay : py::object();
}

// id(parameter) -> ids of its state, for parameters that no step has moved yet.
std::map<std::uintptr_t, std::vector<std::uintptr_t>> unused(TorchOptimizer& self) {
  const auto id = [](PyObject* object) { return reinterpret_cast<std::uintptr_t>(object); };
  std::map<std::uintptr_t, std::vector<std::uintptr_t>> result;
  for (const auto& [tensor, states] : self.unused())
    for (PyObject* state : states) result[id(tensor)].push_back(id(state));
  return result;
}

TorchOptimizer::GroupOptions group_options(const py::dict& group, const std::string& rule,
                                           const Options& options, bool maximize,
                                           const py::set& watched, bool is_mutable) {
  return {group, make_rule(rule, options), maximize, watched, is_mutable};
}

// `states` are a list of tensors, or None where the parameter lacks state that it will need, and
// `powers` one for each of them where they are in 8 bits; an anchor is its strength, reference, and
// importance or None; a master has with it the version that the parameter had when it was its
// rounding.
using Anchor = std::tuple<double, py::object, py::object>;
using Master = std::tuple<py::object, std::int64_t>;
void add_parameter(TorchOptimizer& self, const py::object& tensor, std::string name,
                   const std::optional<std::vector<py::object>>& states,
                   const std::vector<py::object>& powers, const std::vector<py::object>& scalars,
                   const std::vector<std::pair<py::object, std::size_t>>& places, bool is_first,
                   bool is_sharded, std::shared_ptr<rules::RowHistory> history,
                   const std::optional<Anchor>& anchor,
                   std::shared_ptr<rules::BlockProgress> block_progress, const py::object& average,
                   const std::optional<Master>& master, const py::object& lower_half) {
  std::optional<TorchOptimizer::Anchor> pull;
  if (anchor) std::apply([&](auto... parts) { pull = TorchOptimizer::Anchor{parts...}; }, *anchor);
  std::optional<TorchOptimizer::Master> wide;
  if (master) wide = {std::get<0>(*master), std::get<1>(*master)};
  self.add_parameter({tensor, std::move(name), states.value_or(std::vector<py::object>{}), powers,
                      scalars, places, states.has_value(), is_first, is_sharded, std::move(history),
                      std::move(pull), std::move(block_progress), average, std::move(wide),
                      lower_half});
}

}  // namespace

void register_torch(py::module_& module) {
  using namespace py::literals;
  py::class_<TorchOptimizer>(module, "TorchOptimizer")
      .def(py::init([](const py::object& tensors, bool use_exchange_table) {
             return std::make_unique<TorchOptimizer>(
                 arrays::TorchTensors(tensors, use_exchange_table));
           }),
           "tensors"_a, "use_exchange_table"_a)
      .def("step", &step, "optimizer"_a, "groups"_a, "state"_a, "grad_scale"_a, "zero_grad"_a,
           "loss_scale"_a = py::none(), "found_inf"_a = py::none(), "where"_a = py::list(),
           "samples"_a = py::tuple())
      .def("set_resident", &TorchOptimizer::set_resident, "value"_a)
      .def("unused", &unused)
      .def("forget", &TorchOptimizer::forget)
      .def(
          "add_group",
          [](TorchOptimizer& self, const py::dict& group, const std::string& rule,
             const Options& options, bool maximize, const py::set& watched, bool is_mutable) {
            self.add_group(group_options(group, rule, options, maximize, watched, is_mutable));
          },
          "group"_a, "rule"_a, "options"_a, "maximize"_a, "watched"_a, "is_mutable"_a)
      .def(
          "set_options",
          [](TorchOptimizer& self, std::size_t index, const py::dict& group,
             const std::string& rule, const Options& options, bool maximize, const py::set& watched,
             bool is_mutable) {
            self.set_options(index,
                             group_options(group, rule, options, maximize, watched, is_mutable));
          },
          "index"_a, "group"_a, "rule"_a, "options"_a, "maximize"_a, "watched"_a, "is_mutable"_a)
      .def("add_parameter", &add_parameter, "tensor"_a, "name"_a, "states"_a, "powers"_a,
           "scalars"_a, "places"_a, "is_first"_a, "is_sharded"_a, "history"_a, "anchor"_a,
           "block_progress"_a, "average"_a, "master"_a, "lower_half"_a)
      .def("catch_up", &catch_up, "optimizer"_a, "indices"_a)
      .def_property("steps", &TorchOptimizer::steps,
                    [](TorchOptimizer& self, std::int64_t steps) {
                      self.steps();  // what GPUs have counted so far does not come on top
                      self.stepper.steps = steps;
                    })
      .def_readwrite("seed", &TorchOptimizer::seed)
      .def_readwrite("is_swapped", &TorchOptimizer::is_swapped)
      .def("ask_again", &TorchOptimizer::ask_again)
      .def(
          "exclusively",
          [](TorchOptimizer& self, const py::function& function) {
            const engine::Turnstile::Turn turn(self.turnstile);
            return function();
          },
          "function"_a)
      .def("seal", &TorchOptimizer::seal, "state"_a)
      .def_property(
          "skip_nonfinite",
          [](const TorchOptimizer& self) { return self.stepper.settings.skip_nonfinite; },
          &TorchOptimizer::set_skip_nonfinite)
      .def_property(
          "max_norm", [](const TorchOptimizer& self) { return self.stepper.settings.max_norm; },
          [](TorchOptimizer& self, std::optional<double> value) {
            self.stepper.settings.max_norm = value;
          })
      .def_property(
          "clip_value", [](const TorchOptimizer& self) { return self.stepper.settings.clip_value; },
          [](TorchOptimizer& self, std::optional<double> value) {
            self.stepper.settings.clip_value = value;
          })
      .def_property(
          "stochastic_rounding",
          [](const TorchOptimizer& self) { return self.stepper.settings.stochastic_rounding; },
          [](TorchOptimizer& self, bool value) {
            self.stepper.settings.stochastic_rounding = value;
          })
      .def("set_ema_decay", &set_ema_decay, "decay"_a)
      .def_property("skipped_steps", &TorchOptimizer::skipped_steps,
                    [](TorchOptimizer& self, std::int64_t value) {
                      self.skipped_steps();  // likewise
                      self.stepper.skipped_steps = value;
                    });

  module.def(
      "allocate_state",
      [](const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
         std::uint8_t code, std::uint8_t bits) {
        return arrays::StateMemory::allocate(shape, strides, {code, bits, 1});
      },
      "shape"_a, "strides"_a, "code"_a, "bits"_a);
}

}  // namespace fusestep::bind
