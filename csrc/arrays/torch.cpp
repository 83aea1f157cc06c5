#include "arrays/torch.h"

#include <utility>

#include "arrays/exchange.h"
#include "arrays/foreign_errors.h"
#include "arrays/rows.h"
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
      rows_of_(module.attr("rows_of")),
      refusal_(module.attr("refusal")),
      describe_(module.attr("describe")),
      increment_versions_(module.attr("increment_versions")),
      clear_gradient_(module.attr("clear_gradient")),
      current_stream_(module.attr("current_stream")),
      grad_descriptor_(py::getattr(reinterpret_cast<PyObject*>(tensor_type_), "grad")),
      version_descriptor_(py::getattr(reinterpret_cast<PyObject*>(tensor_type_), "_version")),
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

Array TorchTensors::view(PyObject* tensor, const Label& label, Expected expected) const {
  const py::object object = plain(tensor);
  dlpack::Tensor fields;
  if (!read(object.ptr(), fields)) refuse(tensor, label);
  try {
    Array array = from_tensor(fields, nullptr, expected, label);
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

// A tensor's attribute, which the class has this descriptor for.
py::object TorchTensors::attribute(PyObject* tensor, const py::object& descriptor,
                                   const char* name) const {
  PyObject* value = nullptr;
  if (Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type) && is_plain(tensor)) {
    // What the interpreter would come to after looking the name up in every base class.
    const PyGetSetDef& getter = *reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    value = getter.get(tensor, getter.closure);
  } else {
    has_run_code = true;
    value = PyObject_GetAttrString(tensor, name);
  }
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

PyObject* TorchTensors::gradient_of(PyObject* parameter) const {
  return attribute(parameter, grad_descriptor_, "grad").release().ptr();
}

std::int64_t TorchTensors::version_of(PyObject* tensor) const {
  return attribute(tensor, version_descriptor_, "_version").cast<std::int64_t>();
}

bool TorchTensors::view_usual_gradient(PyObject* parameter, const Array& parameter_view,
                                       PyObject* gradient, Array& view) const {
  if (!is_plain(gradient) || !is_plain(parameter)) return false;
  dlpack::Tensor fields;
  if (!read(gradient, fields)) {
    PyErr_Clear();
    return false;
  }
  const bool may_be_lazy = fields.dtype.code == dlpack::kComplex || parameter_view.size <= 1 ||
                           !parameter_view.c_contiguous;
  if (may_be_lazy || !view_like(parameter_view, fields, gradient, view)) return false;
  Py_INCREF(gradient);
  return true;
}

TorchTensors::Gradient TorchTensors::unusual_gradient(PyObject* parameter,
                                                      const Array& parameter_view,
                                                      PyObject* gradient,
                                                      const Label& label) const {
  auto object = py::reinterpret_borrow<py::object>(gradient);
  has_run_code = true;
  bool is_copy = false;
  if (!is_plain(gradient) || !is_plain(parameter)) {
    const py::tuple local = local_gradient_(py::handle(parameter), object);
    object = local[0];
    is_copy = local[1].cast<bool>();
  }
  const bool is_sparse = object.attr("is_sparse").cast<bool>();
  Gradient result =
      is_sparse ? sparse_gradient(parameter_view, object, label) : dense_gradient(object, label);
  result.is_copy = result.is_copy || is_copy;
  return result;
}

Array TorchTensors::view_samples(PyObject* values, const Label& label) const {
  has_run_code = true;
  return dense_gradient(plain(values), label).view;
}

TorchTensors::Gradient TorchTensors::dense_gradient(const py::object& tensor,
                                                    const Label& label) const {
  dlpack::Tensor fields;
  if (!read(tensor.ptr(), fields)) refuse(tensor.ptr(), label);
  Gradient result{{}, {}, false};
  try {
    result.view = from_tensor(fields, Py_NewRef(tensor.ptr()), Expected::complex_as_real, label);
  } catch (const TypeError&) {
    refuse(tensor.ptr(), label);
  }
  if (!is_lazily_conjugated(tensor.ptr(), fields, result.view)) return result;
  result = dense_gradient(resolved_(tensor), label);
  result.is_copy = true;
  return result;
}

TorchTensors::Gradient TorchTensors::sparse_gradient(const Array& parameter_view,
                                                     const py::object& tensor,
                                                     const Label& label) const {
  py::tuple parts;
  try {
    parts = rows_of_(tensor);
  } catch (const py::error_already_set& error) {
    rethrow_as_type_error(error, {PyExc_TypeError}, label.text() + " ");
  }
  const auto table_rows = static_cast<std::int64_t>(py::len(tensor));
  const auto shape = parameter_view.geometry().shape;
  if (!shape.empty() && shape[0] != table_rows)
    throw ValueError(label.text() + " is of " + std::to_string(table_rows) + " rows; expected " +
                     std::to_string(shape[0]));
  const py::object indices = parts[0], values = parts[1];
  Gradient gradient = dense_gradient(values, label);
  const Label of_indices{"the row indices for ", label.name};
  if (const Device device = gradient.view.device; device.kind == Device::cuda)
    check_can_be_fetched(device, current_stream(device), of_indices,
                         "a dense gradient, as of nn.Embedding(sparse=False)");
  const py::object numbers = indices.attr("cpu")().attr("numpy")();
  Rows rows{read_row_numbers(numbers.ptr(), parameter_view, of_indices), std::move(gradient.view)};
  check_row_count(rows, label.name);
  return {std::move(rows.values), std::move(rows.numbers), gradient.is_copy};
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
  const Array array = from_tensor(fields, nullptr, Expected::floats, {"", kName});
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

void TorchTensors::clear_gradient(PyObject* gradient) const noexcept {
  PyObject* result = PyObject_CallOneArg(clear_gradient_.ptr(), gradient);
  if (!result) PyErr_WriteUnraisable(gradient);  // the step has happened
  Py_XDECREF(result);
}

}  // namespace fusestep::arrays
