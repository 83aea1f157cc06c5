#include "arrays/torch.h"

#include <utility>

#include "arrays/exchange.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

PyTypeObject* type_of(const py::object& module, const char* name) {
  return reinterpret_cast<PyTypeObject*>(module.attr(name).ptr());  // torch is never unloaded
}

}  // namespace

TorchTensors::TorchTensors(const py::object& module, bool use_exchange_table)
    : tensor_type_(type_of(module, "Tensor")),
      parameter_type_(type_of(module, "Parameter")),
      local_(module.attr("local")),
      local_gradient_(module.attr("local_gradient")),
      resolved_(module.attr("resolved")),
      refusal_(module.attr("refusal")),
      describe_(module.attr("describe")),
      increment_versions_(module.attr("increment_versions")),
      current_stream_(module.attr("current_stream")),
      grad_descriptor_(py::getattr(reinterpret_cast<PyObject*>(tensor_type_), "grad")),
      api_(use_exchange_table ? exchange_api(tensor_type_) : nullptr) {}

// False, with a Python exception, where the tensor has no memory that can be described.
bool TorchTensors::read(PyObject* tensor, dlpack::Tensor& fields) const {
  if (api_) return api_->read(tensor, &fields) == 0;
  has_run_code = true;
  try {
    const py::tuple description = describe_(py::handle(tensor));
    const auto [address, device, index, code, bits, shape, strides] =
        description.cast<std::tuple<std::uintptr_t, std::int32_t, std::int32_t, std::uint8_t,
                                    std::uint8_t, py::tuple, py::tuple>>();
    numbers_.clear();
    for (const py::tuple& list : {shape, strides})
      for (const py::handle number : list) numbers_.push_back(number.cast<std::int64_t>());
    fields = {reinterpret_cast<void*>(address),
              {device, index},
              static_cast<std::int32_t>(shape.size()),
              {code, bits, 1},
              numbers_.data(),
              numbers_.data() + shape.size(),
              0};
    return true;
  } catch (py::error_already_set& error) {
    error.restore();
    return false;
  }
}

void TorchTensors::refuse(PyObject* tensor, const Label& label) const {
  PyErr_Clear();
  throw TypeError(label.text() + " " + refusal_(py::handle(tensor)).cast<std::string>());
}

// The plain tensor that holds the numbers of a tensor.
py::object TorchTensors::plain(PyObject* tensor) const {
  if (is_plain(tensor)) return py::reinterpret_borrow<py::object>(tensor);
  has_run_code = true;
  return local_(py::handle(tensor));
}

Array TorchTensors::view(PyObject* tensor, const Label& label) const {
  const py::object object = plain(tensor);
  dlpack::Tensor fields;
  if (!read(object.ptr(), fields)) refuse(tensor, label);
  try {
    Array array = from_tensor(fields, nullptr, Complex::viewed_as_real, label);
    if (is_lazily_conjugated(object.ptr(), fields, array))
      throw ValueError(label.text() +
                       " is a view that torch has not yet conjugated or negated; pass its "
                       ".resolve_conj().resolve_neg()");
    return array;
  } catch (const TypeError&) {
    refuse(tensor, label);
  }
}

bool TorchTensors::is_at(PyObject* tensor, const Array& array) const {
  const py::object object = plain(tensor);
  dlpack::Tensor fields;
  if (!read(object.ptr(), fields)) {
    PyErr_Clear();
    return false;
  }
  return array.is_view_of(fields) && (fields.dtype.code != dlpack::kComplex ||
                                      !is_lazily_conjugated(object.ptr(), fields, array));
}

PyObject* TorchTensors::gradient_of(PyObject* parameter) const {
  PyObject* gradient = nullptr;
  if (Py_IS_TYPE(grad_descriptor_.ptr(), &PyGetSetDescr_Type) && is_plain(parameter)) {
    // What the interpreter would come to after looking the name up in every base class.
    const PyGetSetDef& getter =
        *reinterpret_cast<PyGetSetDescrObject*>(grad_descriptor_.ptr())->d_getset;
    gradient = getter.get(parameter, getter.closure);
  } else {
    has_run_code = true;
    gradient = PyObject_GetAttrString(parameter, "grad");
  }
  if (!gradient) throw py::error_already_set();
  return gradient;
}

bool TorchTensors::view_gradient(PyObject* parameter, const Array& parameter_view,
                                 PyObject* gradient, const Label& label, Array& view) const {
  dlpack::Tensor fields;
  if (is_plain(gradient) && is_plain(parameter)) {
    if (!read(gradient, fields)) refuse(gradient, label);
    const bool may_be_lazy = fields.dtype.code == dlpack::kComplex || parameter_view.size <= 1 ||
                             !parameter_view.c_contiguous;
    if (!may_be_lazy && view_like(parameter_view, fields, gradient, view)) {
      Py_INCREF(gradient);
      return false;
    }
  }
  return view_unusual_gradient(parameter, gradient, label, view);
}

bool TorchTensors::view_unusual_gradient(PyObject* parameter, PyObject* gradient,
                                         const Label& label, Array& view) const {
  auto object = py::reinterpret_borrow<py::object>(gradient);
  has_run_code = true;
  bool is_copy = false;
  if (!is_plain(gradient) || !is_plain(parameter)) {
    const py::tuple local = local_gradient_(py::handle(parameter), object);
    object = local[0];
    is_copy = local[1].cast<bool>();
  }
  dlpack::Tensor fields;
  if (!read(object.ptr(), fields)) refuse(object.ptr(), label);
  try {
    view = from_tensor(fields, Py_NewRef(object.ptr()), Complex::viewed_as_real, label);
  } catch (const TypeError&) {
    refuse(object.ptr(), label);
  }
  if (!is_lazily_conjugated(object.ptr(), fields, view)) return is_copy;
  const py::object resolved = resolved_(object);
  view_unusual_gradient(parameter, resolved.ptr(), label, view);
  return true;
}

bool TorchTensors::is_lazily_conjugated(PyObject* tensor, const dlpack::Tensor& fields,
                                        const Array& array) const {
  const bool conjugated =
      fields.dtype.code == dlpack::kComplex && py::handle(tensor).attr("is_conj")().cast<bool>();
  return conjugated || is_lazily_negated(tensor, array);
}

std::optional<TorchTensors::NumberOnGpu> TorchTensors::number_on_gpu(PyObject* object) const {
  if (!is_plain(object)) return {};
  dlpack::Tensor fields;
  static const std::string kName = "a number";
  if (!read(object, fields)) {
    PyErr_Clear();
    return {};
  }
  if (fields.device.type == dlpack::kCpu || fields.dtype.code != dlpack::kFloat) return {};
  const Array array = from_tensor(fields, nullptr, Complex::refused, {"", kName});
  const bool is_usable = array.device.kind == Device::cuda && array.size == 1 &&
                         (array.dtype == DType::float32 || array.dtype == DType::float64);
  if (!is_usable) return {};
  return NumberOnGpu{array.device, array.data, array.dtype == DType::float64};
}

std::uintptr_t TorchTensors::current_stream(const Device& device) const {
  if (api_)
    if (const auto stream = exchange_stream(*api_, device)) return *stream;
  has_run_code = true;
  return current_stream_(device.index).cast<std::uintptr_t>();
}

void TorchTensors::increment_versions(PyObject* tensors) const noexcept {
  PyObject* result = PyObject_CallOneArg(increment_versions_.ptr(), tensors);
  if (!result) PyErr_WriteUnraisable(increment_versions_.ptr());  // the step is under way
  Py_XDECREF(result);
}

}  // namespace fusestep::arrays
