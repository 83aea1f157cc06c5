#include "arrays/samples.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "arrays/rows.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

PyTypeObject *samples_type = nullptr, *outer_type = nullptr;

// By a name that is made once: a small step is done in the time it takes to make ten.
py::object attribute(const py::handle& object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

struct Names {
  PyObject* error = PyUnicode_InternFromString("error");
  PyObject* max_norm = PyUnicode_InternFromString("max_norm");
  PyObject* noise_multiplier = PyUnicode_InternFromString("noise_multiplier");
  PyObject* reduction = PyUnicode_InternFromString("reduction");
  PyObject* values = PyUnicode_InternFromString("values");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* x = PyUnicode_InternFromString("x");
};
const Names& names() {
  static const Names names;
  return names;
}

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

// Attributes may have been assigned to.
void check_is_positive(double value, const char* what, const std::string& name) {
  if (value > 0 && std::isfinite(value)) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  throw ValueError(std::string(what) + " of the samples for " + name + " is " + text +
                   "; expected a positive number");
}

// What is weighed: gradients, or the errors that they are made from.
Samples read_values(const py::handle& given, const Array& parameter, const std::string& name,
                    const View& view) {
  const py::object values = attribute(given, names().values);
  Samples result{{}, view(values.ptr(), {"the gradient of ", name})};
  const auto shape = result.values.geometry().shape;
  if (shape.empty())
    throw ValueError("the samples for " + name +
                     " have values of no dimensions; expected one gradient for each sample");
  result.samples.weight = read_weights(attribute(given, names().weight), shape[0], parameter, name);
  return result;
}

Samples read_factors(const py::handle& given, const Array& parameter, const std::string& name,
                     const View& view) {
  const py::object error = attribute(given, names().error), x = attribute(given, names().x);
  Samples result{{}, view(error.ptr(), {"the error for ", name}), true};
  if (!x.is_none()) result.x = view(x.ptr(), {"the x for ", name});
  const auto shape = result.values.geometry().shape;
  const auto text = [&] {
    return "the error for " + name + " has shape " + shape_text(result.values);
  };
  if (shape.empty() || shape.size() > 3)
    throw ValueError(text() + "; expected (out,), (N, out) or (N, positions, out)");
  const std::span<const std::int64_t> terms = shape.first(shape.size() - 1);
  if (result.x) {
    const auto other = result.x->geometry().shape;
    if (other.size() != shape.size() || !std::ranges::equal(terms, other.first(terms.size())))
      throw ValueError(text() + " and its x " + shape_text(*result.x) +
                       "; expected the same but for the last axis");
  }
  result.samples.positions = terms.size() == 2 ? terms[1] : 1;
  result.samples.weight =
      read_weights(attribute(given, names().weight), terms.empty() ? 1 : terms[0], parameter, name);
  return result;
}

}  // namespace

void set_samples_types(PyObject* samples, PyObject* outer) {
  samples_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(samples));
  outer_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(outer));
}

bool is_samples(PyObject* object) {
  return samples_type &&
         (PyObject_TypeCheck(object, samples_type) || PyObject_TypeCheck(object, outer_type));
}

Samples from_samples(PyObject* object, const Array& parameter, const std::string& name,
                     const View& view) {
  const py::handle given(object);
  Samples result = PyObject_TypeCheck(object, outer_type)
                       ? read_factors(given, parameter, name, view)
                       : read_values(given, parameter, name, view);
  gradients::Samples& samples = result.samples;
  samples.max_norm = attribute(given, names().max_norm).cast<std::optional<double>>();
  samples.noise_multiplier = attribute(given, names().noise_multiplier).cast<double>();
  samples.find_present();
  const py::object reduction = attribute(given, names().reduction);
  if (!py::isinstance<py::str>(reduction))
    samples.divisor = reduction.cast<double>();
  else if (reduction.cast<std::string>() == "mean")
    samples.divisor = static_cast<double>(samples.present.size());
  if (samples.divisor == 0 && samples.has_noise())
    throw ValueError("there are no samples for " + name +
                     ", so noise has no mean to be added to: give the expected number of samples "
                     "as the reduction, Samples(..., reduction=256)");
  check_is_positive(samples.max_norm.value_or(1), "max_norm", name);
  if (!samples.is_nothing()) check_is_positive(samples.divisor, "reduction", name);
  return result;
}

}  // namespace fusestep::arrays
