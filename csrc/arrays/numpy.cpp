#include "arrays/numpy.h"

#include <pybind11/numpy.h>

#include <optional>

#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t), "64-bit platforms only");

constexpr int kHalf = 23, kFloat = 11, kDouble = 12;  // NPY_HALF, ...: fixed by NumPy's ABI
constexpr int kUnsignedByte = 2, kShort = 3, kUnsignedShort = 4;
constexpr int kFirstUserType = 256;

const py::detail::npy_api& api() {
  static const py::detail::npy_api& numpy = py::detail::npy_api::get();
  return numpy;
}

// bfloat16 is not NumPy's own: ml_dtypes registers it, under a number that is free at that time.
bool is_bfloat16(const PyObject* descriptor_type) {
  const auto* type = reinterpret_cast<const PyTypeObject*>(descriptor_type);
  static const PyTypeObject* known = nullptr;
  if (type == known) return true;
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* ml_dtypes = PyDict_GetItemString(modules, "ml_dtypes");
  if (!ml_dtypes) return false;
  const py::object bfloat16 = py::getattr(ml_dtypes, "bfloat16", py::none());
  if (bfloat16.ptr() != reinterpret_cast<const PyObject*>(type)) return false;
  known = type;  // a type object lives as long as its module
  return true;
}

std::optional<DType> dtype_of(PyObject* descriptor) {
  const auto* fields = py::detail::array_descriptor1_proxy(descriptor);
  switch (fields->type_num) {
    case kFloat: return DType::float32;
    case kDouble: return DType::float64;
    case kHalf: return DType::float16;
    case kUnsignedByte: return DType::bits8;
    case kShort:
    case kUnsignedShort: return DType::bits16;
    default:
      if (fields->type_num >= kFirstUserType && is_bfloat16(fields->typeobj))
        return DType::bfloat16;
      return std::nullopt;
  }
}

bool is_native(PyObject* descriptor) {
  const char order = py::detail::array_descriptor1_proxy(descriptor)->byteorder;
  return order == '=' || order == '|' || order == '<';
}

}  // namespace

bool is_masked(PyObject* object) {
  PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "numpy.ma");
  if (!module) return false;
  const py::object masked = py::getattr(module, "MaskedArray", py::none());
  return !masked.is_none() && PyObject_IsInstance(object, masked.ptr()) == 1;
}

bool is_numpy(PyObject* object) {
  return Py_TYPE(object) == api().PyArray_Type_ || PyObject_TypeCheck(object, api().PyArray_Type_);
}

NumpyFields numpy_fields(PyObject* array) {
  using Api = py::detail::npy_api;
  const auto* fields = py::detail::array_proxy(array);
  return {reinterpret_cast<std::byte*>(fields->data),
          static_cast<std::size_t>(fields->nd),
          reinterpret_cast<const std::int64_t*>(fields->dimensions),
          reinterpret_cast<const std::int64_t*>(fields->strides),
          (fields->flags & Api::NPY_ARRAY_WRITEABLE_) != 0,
          (fields->flags & Api::NPY_ARRAY_C_CONTIGUOUS_) != 0,
          fields->descr};
}

Array from_numpy(PyObject* object, const Label& label, Expected expected) {
  const NumpyFields now = numpy_fields(object);
  const std::optional<DType> dtype = dtype_of(now.descriptor);
  if (!dtype || is_float(*dtype) != (expected != Expected::bits) || !is_native(now.descriptor))
    throw TypeError(label.text() + " has dtype " +
                    py::str(py::handle(now.descriptor)).cast<std::string>() + "; expected " +
                    dtypes_text(expected) + " (in native byte order)");
  if (Py_TYPE(object) != api().PyArray_Type_ && is_masked(object))
    throw TypeError(label.text() +
                    " is a masked array, whose mask a step would ignore; pass its .data");

  Array array;
  array.data = now.data;
  array.dtype = *dtype;
  array.writable = now.writable;
  array.c_contiguous = now.c_contiguous;
  array.ndim_ = now.ndim;
  array.shape_ = now.shape;
  array.strides_ = now.strides;
  array.size = 1;
  for (std::size_t axis = 0; axis < now.ndim; ++axis) array.size *= now.shape[axis];
  array.owner_ = Py_NewRef(object);
  return array;
}

bool is_numpy_scalar(PyObject* object) {
  static PyObject* const generic =
      py::object(py::module_::import("numpy").attr("generic")).release().ptr();
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(generic));
}

Array from_numpy_scalar(PyObject* object, const Label& label) {
  const py::object array = py::module_::import("numpy").attr("asarray")(py::handle(object));
  Array result = from_numpy(array.ptr(), label, Expected::floats);
  result.writable = false;  // a copy: what is written to it is lost
  return result;
}

}  // namespace fusestep::arrays
