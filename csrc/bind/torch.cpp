#include "arrays/state_memory.h"
#include "engine/torch_optimizer.h"

#include <pybind11/stl.h>

#include "bind/register.h"

namespace py = pybind11;

namespace fusestep::bind {
namespace {

using engine::Outcome;
using engine::TorchOptimizer;
using Options = std::map<std::string, double>;

std::unique_ptr<TorchOptimizer> make_optimizer(const py::object& tensors, bool use_exchange_table) {
  return std::make_unique<TorchOptimizer>(arrays::TorchTensors(tensors, use_exchange_table));
}

// `states` are a list of tensors, or None where the parameter lacks state that it will need.
void add_parameter(TorchOptimizer& optimizer, const py::object& tensor, std::string name,
                   const py::object& states, std::optional<std::size_t> scalars,
                   std::int64_t updates, bool is_sharded) {
  TorchOptimizer::Parameter parameter{std::move(name), tensor.ptr(),      {},        updates,
                                      scalars,         !states.is_none(), is_sharded};
  if (!states.is_none())
    for (const py::handle state : py::cast<py::list>(states))
      parameter.states.push_back(state.ptr());
  optimizer.add_parameter(std::move(parameter));
}

using Norm = std::optional<std::pair<double, bool>>;

int step(TorchOptimizer& optimizer, const py::handle& groups, const py::handle& state,
         double grad_scale, bool zero_grad, const Norm& norm) {
  engine::StepArguments arguments{.grad_scale = grad_scale, .zero_grad = zero_grad};
  if (norm) arguments.norm = cpu::GradientNorm{norm->first, norm->second};
  return static_cast<int>(optimizer.step(groups.ptr(), state.ptr(), arguments));
}

// (place of the parameter, norm of its gradient, whether that is finite) for each gradient; None
// where the optimizer is stale.
py::object gradient_norms(TorchOptimizer& optimizer, const py::handle& groups,
                          const py::handle& state) {
  const auto norms = optimizer.gradient_norms(groups.ptr(), state.ptr());
  if (!norms) return py::none();
  py::list list;
  for (const auto& [parameter, norm] : *norms)
    list.append(py::make_tuple(parameter, norm.value, norm.finite));
  return list;
}

}  // namespace

void register_torch(py::module_& module) {
  using namespace py::literals;
  auto optimizer =
      py::class_<TorchOptimizer>(module, "TorchOptimizer")
          .def(py::init(&make_optimizer), "tensors"_a, "use_exchange_table"_a)
          .def("forget", &TorchOptimizer::forget)
          .def(
              "add_group",
              [](TorchOptimizer& self, const py::dict& group, const std::string& rule,
                 const Options& options, bool maximize, const py::set& watched) {
                self.add_group(group, make_rule(rule, options), maximize, watched);
              },
              "group"_a, "rule"_a, "options"_a, "maximize"_a, "watched"_a)
          .def(
              "set_options",
              [](TorchOptimizer& self, std::size_t index, const py::dict& group,
                 const std::string& rule, const Options& options, bool maximize,
                 const py::set& watched) {
                self.set_options(index, group, make_rule(rule, options), maximize, watched);
              },
              "index"_a, "group"_a, "rule"_a, "options"_a, "maximize"_a, "watched"_a)
          .def("add_parameter", &add_parameter, "tensor"_a, "name"_a, "states"_a, "scalars"_a,
               "updates"_a, "is_sharded"_a)
          .def("seal", &TorchOptimizer::seal, "state"_a, "scalars"_a)
          .def("step", &step, "groups"_a, "state"_a, "grad_scale"_a, "zero_grad"_a,
               "norm"_a = py::none())
          .def("gradient_norms", &gradient_norms, "groups"_a, "state"_a)
          .def_property(
              "skip_nonfinite",
              [](const TorchOptimizer& self) { return self.stepper.settings.skip_nonfinite; },
              [](TorchOptimizer& self, bool value) {
                self.stepper.settings.skip_nonfinite = value;
              })
          .def_property(
              "max_norm", [](const TorchOptimizer& self) { return self.stepper.settings.max_norm; },
              [](TorchOptimizer& self, std::optional<double> value) {
                self.stepper.settings.max_norm = value;
              })
          .def_property(
              "skipped_steps",
              [](const TorchOptimizer& self) { return self.stepper.skipped_steps; },
              [](TorchOptimizer& self, std::int64_t value) { self.stepper.skipped_steps = value; });
  module.def(
      "allocate_state",
      [](const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
         std::uint8_t code, std::uint8_t bits) {
        return arrays::StateMemory::allocate(shape, strides, {code, bits, 1});
      },
      "shape"_a, "strides"_a, "code"_a, "bits"_a);
  optimizer.attr("DONE") = static_cast<int>(Outcome::done);
  optimizer.attr("STALE") = static_cast<int>(Outcome::stale);
  optimizer.attr("NEW_OPTIONS") = static_cast<int>(Outcome::new_options);
  optimizer.attr("NEEDS_NORM") = static_cast<int>(Outcome::needs_norm);
  optimizer.attr("SKIPPED") = static_cast<int>(Outcome::skipped);
}

}  // namespace fusestep::bind
