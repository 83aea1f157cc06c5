#include "arrays/samples.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdio>
#include <utility>

#include "arrays/rows.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

PyTypeObject* samples_type = nullptr;

// As float64 in the CPU's memory; of a GPU they are fetched.
py::array_t<double> weights_on_host(const py::object& weight, const Array& parameter,
                                    const std::string& name) {
  const std::string label = "the weights of the samples for " + name;
  if (parameter.device.kind == Device::cuda &&
      py::module_::import("fusestep._arrays").attr("is_on_gpu")(weight).cast<bool>())
    check_can_be_fetched(parameter.device, parameter.current_stream(), {"", label},
                         "numbers in the memory of the CPU");
  return py::module_::import("fusestep.gradients").attr("as_weights")(weight, label);
}

std::vector<double> read_weights(const py::object& weight, std::int64_t count,
                                 const Array& parameter, const std::string& name) {
  if (weight.is_none()) return std::vector<double>(static_cast<std::size_t>(count), 1.0);
  const py::array_t<double> array = weights_on_host(weight, parameter, name);
  if (array.ndim() != 1 || array.shape(0) != count)
    throw ValueError(
        "the samples for " + name + " have " + std::to_string(count) +
        " gradients and weights of shape " +
        shape_text(std::vector<std::int64_t>(array.shape(), array.shape() + array.ndim())) +
        "; expected one weight for each gradient");
  std::vector<double> weights(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = array.at(i);
    if (!(value >= 0) || !std::isfinite(value)) {
      char text[32];
      std::snprintf(text, sizeof text, "%g", value);
      throw ValueError("the weight of sample " + std::to_string(i) + " for " + name + " is " +
                       text + "; expected a finite number that is not negative");
    }
    weights[static_cast<std::size_t>(i)] = value;
  }
  return weights;
}

}  // namespace

void set_samples_type(PyObject* type) {
  samples_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));
}

bool is_samples(PyObject* object) {
  return samples_type && PyObject_TypeCheck(object, samples_type);
}

Samples from_samples(PyObject* object, const Array& parameter, const std::string& name) {
  const py::object values = py::handle(object).attr("values");
  return from_samples(object, from_object(values.ptr(), {"the gradient of ", name}), parameter,
                      name);
}

Samples from_samples(PyObject* object, Array values, const Array& parameter,
                     const std::string& name) {
  const py::handle given(object);
  const py::object weight = given.attr("weight");
  Samples result{{}, std::move(values)};
  const auto shape = result.values.geometry().shape;
  if (shape.empty())
    throw ValueError("the samples for " + name +
                     " have values of no dimensions; expected one gradient for each sample");
  gradients::Samples& samples = result.samples;
  samples.weight = read_weights(weight, shape[0], parameter, name);
  samples.max_norm = given.attr("max_norm").cast<std::optional<double>>();
  samples.noise_multiplier = given.attr("noise_multiplier").cast<double>();
  samples.find_present();
  const py::object reduction = given.attr("reduction");
  if (!py::isinstance<py::str>(reduction))
    samples.divisor = reduction.cast<double>();
  else if (reduction.cast<std::string>() == "mean")
    samples.divisor = static_cast<double>(samples.present.size());
  if (samples.divisor == 0 && samples.has_noise())
    throw ValueError("there are no samples for " + name +
                     ", so noise has no mean to be added to: give the expected number of samples "
                     "as the reduction, Samples(..., reduction=256)");
  return result;
}

}  // namespace fusestep::arrays
