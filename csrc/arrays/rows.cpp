#include "arrays/rows.h"

#include <pybind11/numpy.h>

#include <cstring>
#include <stdexcept>

#include "arrays/cuda_driver.h"
#include "arrays/foreign_errors.h"
#include "arrays/numpy.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

PyTypeObject* rows_type = nullptr;

// What a function of Python's makes of the indices of a library other than NumPy: NumPy's.
py::array converted(PyObject* object, const py::object& function, const Label& label,
                    const char* where) {
  try {
    return function(py::handle(object));
  } catch (const py::error_already_set& error) {
    rethrow_as_type_error(error,
                          {PyExc_TypeError, PyExc_BufferError, PyExc_AttributeError,
                           PyExc_ValueError, PyExc_RuntimeError},
                          label.text() + " are a " + Py_TYPE(object)->tp_name +
                              "; expected an array of int32 or int64 in the memory of " + where +
                              ": ");
  }
}

py::object of_arrays(const char* name) {
  return py::module_::import("fusestep._arrays").attr(name);
}

py::array fetched(PyObject* object, const Array& parameter, const Label& label) {
  check_can_be_fetched(parameter.device, parameter.current_stream(), label,
                       "an array in the memory of the CPU");
  return converted(object, of_arrays("on_host"), label, "the CPU or a GPU");
}

py::array as_numpy(PyObject* object, const Array& parameter, const Label& label) {
  if (is_masked(object)) throw TypeError(label.text() + " are a masked array; pass its .data");
  if (is_numpy(object)) return py::reinterpret_borrow<py::array>(object);
  if (parameter.device.kind == Device::cuda &&
      of_arrays("is_on_gpu")(py::handle(object)).cast<bool>())
    return fetched(object, parameter, label);
  return converted(object, py::module_::import("numpy").attr("from_dlpack"), label, "the CPU");
}

template <class Integer>
std::vector<std::int64_t> copied(const py::array& array) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(array.shape(0)));
  const auto* at = static_cast<const std::byte*>(array.data());
  for (std::int64_t& number : numbers) {
    Integer value;
    std::memcpy(&value, at, sizeof value);
    number = value;
    at += array.strides(0);
  }
  return numbers;
}

}  // namespace

void set_rows_type(PyObject* type) { rows_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type)); }

bool is_rows(PyObject* object) { return rows_type && PyObject_TypeCheck(object, rows_type); }

std::vector<std::int64_t> read_row_numbers(PyObject* object, const Array& parameter,
                                           const Label& label) {
  const py::array array = as_numpy(object, parameter, label);
  if (array.ndim() == 1 && array.size() == 0) return {};  // np.array([]) has a dtype of floats
  const py::dtype dtype = array.dtype();
  const bool is_native = dtype.byteorder() == '=' || dtype.byteorder() == '<';
  if (dtype.kind() != 'i' || dtype.itemsize() < 4 || !is_native)
    throw TypeError(label.text() + " have dtype " + py::str(dtype).cast<std::string>() +
                    "; expected int32 or int64");
  if (array.ndim() != 1)
    throw ValueError(label.text() + " have " + std::to_string(array.ndim()) +
                     " dimensions; expected one");
  return dtype.itemsize() == 8 ? copied<std::int64_t>(array) : copied<std::int32_t>(array);
}

void check_can_be_fetched(const Device& device, std::uintptr_t stream, const Label& label,
                          const char* expected) {
  if (cuda_driver().is_capturing(device.index, stream))
    throw std::runtime_error("a CUDA graph is being captured, and " + label.text() +
                             " would have to be fetched from the GPU; expected " + expected);
}

void check_row_count(const Rows& rows, const std::string& name) {
  const auto shape = rows.values.geometry().shape;
  if (!shape.empty() && shape[0] == std::ssize(rows.numbers)) return;
  throw ValueError("the rows for " + name + " have " + std::to_string(rows.numbers.size()) +
                   " indices and values of shape " + shape_text(rows.values) +
                   "; expected one row of values for each index");
}

Rows from_rows(PyObject* object, const Array& parameter, const std::string& name) {
  const py::handle rows(object);
  const py::object indices = rows.attr("indices"), values = rows.attr("values");
  Rows result{read_row_numbers(indices.ptr(), parameter, {"the row indices for ", name}),
              from_object(values.ptr(), {"the gradient of ", name})};
  check_row_count(result, name);
  return result;
}

}  // namespace fusestep::arrays
