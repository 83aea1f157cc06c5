#include "arrays/cuda_interface.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "arrays/cuda_driver.h"
#include "arrays/dlpack.h"
#include "arrays/exchange.h"
#include "arrays/foreign_errors.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

constexpr const char* kAttribute = "__cuda_array_interface__";

// A type string such as "<f4": byte order, kind and size. ml_dtypes' bfloat16 is to NumPy two bytes
// of anything, so its name decides.
std::optional<DType> dtype_of(const py::object& object, std::string_view text) {
  if (text.empty() || text.front() == '>') return {};
  text.remove_prefix(1);
  if (text == "f4") return DType::float32;
  if (text == "f8") return DType::float64;
  if (text == "f2") return DType::float16;
  if (text == "u1") return DType::bits8;
  if (text == "i2" || text == "u2") return DType::bits16;
  const bool may_be_bfloat16 = text == "V2" && py::hasattr(object, "dtype");
  if (may_be_bfloat16 && py::str(object.attr("dtype")).cast<std::string>() == "bfloat16")
    return DType::bfloat16;
  return {};
}

// 0 is not a stream of the protocol, 1 is the default stream; to CUDA both are. A library means the
// current device; on another one it is taken to work in the default stream.
std::uintptr_t stream_of(const py::object& object, const py::dict& interface,
                         const Device& device) {
  constexpr std::uintptr_t kDefault = 1;
  py::object stream = interface.attr("get")("stream");
  if (stream.is_none() && is_cupy(object.ptr()))  // told to speak version 2, which has none
    stream = py::module_::import("cupy").attr("cuda").attr("get_current_stream")().attr("ptr");
  if (stream.is_none()) return 0;
  const auto value = stream.cast<std::uintptr_t>();
  if (value <= kDefault || device.kind != Device::cuda) return 0;
  return cuda_driver().current_device() == device.index ? value : 0;
}

Device device_of_array(const py::object& object, const void* data, const Label& label) {
  if (py::hasattr(object, "__dlpack_device__")) {
    const py::tuple device = object.attr("__dlpack_device__")();
    return device_of({device[0].cast<std::int32_t>(), device[1].cast<std::int32_t>()}, label);
  }
  const Device assumed = device_of({dlpack::kCuda, 0}, label);
  if (!data) return assumed;  // of no elements
  const int index = cuda_driver().device_of(data);
  return index < 0 ? Device{} : Device{Device::cuda, index};
}

}  // namespace

bool has_cuda_interface(PyObject* object) {
  return !is_torch(object) && PyObject_HasAttrString(object, kAttribute);
}

Array from_cuda_interface(PyObject* object, const Label& label, Expected expected) {
  const auto given = py::reinterpret_borrow<py::object>(object);
  Array array;
  try {
    const py::dict interface = given.attr(kAttribute);
    const auto type = interface["typestr"].cast<std::string>();
    const std::optional<DType> dtype = dtype_of(given, type);
    if (!dtype || is_float(*dtype) != (expected != Expected::bits))
      throw TypeError(label.text() + " has dtype '" + type + "'; expected " +
                      dtypes_text(expected));
    if (!interface.attr("get")("mask").is_none())
      throw TypeError(label.text() + " has a mask; expected a plain array");
    const py::tuple data = interface["data"], shape = interface["shape"];
    const py::object strides = interface.attr("get")("strides");
    if (data.size() != 2 || (!strides.is_none() && py::len(strides) != shape.size()))
      throw TypeError(label.text() + " has a __cuda_array_interface__ that contradicts itself");

    array.data = reinterpret_cast<std::byte*>(data[0].cast<std::uintptr_t>());
    array.writable = !data[1].cast<bool>();
    array.dtype = *dtype;
    array.ndim_ = shape.size();
    array.owned_.resize(2 * array.ndim_);
    for (std::size_t axis = 0; axis < array.ndim_; ++axis)
      array.owned_[axis] = shape[axis].cast<std::int64_t>();
    check_plausible(std::span(array.owned_).first(array.ndim_), array.data, label);
    array.size = 1;
    for (std::size_t axis = array.ndim_; axis-- > 0; array.size *= array.owned_[axis]) {
      array.owned_[array.ndim_ + axis] = strides.is_none()
                                             ? array.size * item_size(*dtype)
                                             : strides[py::int_(axis)].cast<std::int64_t>();
    }
    array.device = device_of_array(given, array.data, label);
    array.stream = stream_of(given, interface, array.device);
  } catch (const py::error_already_set& error) {
    rethrow_as_type_error(error,
                          {PyExc_TypeError, PyExc_AttributeError, PyExc_KeyError, PyExc_ValueError},
                          label.text() + " has a __cuda_array_interface__ that cannot be read: ");
  } catch (py::cast_error&) {
    throw TypeError(label.text() + " has a __cuda_array_interface__ that cannot be read");
  }
  array.shape_ = array.owned_.data();
  array.strides_ = array.owned_.data() + array.ndim_;
  array.c_contiguous = is_c_contiguous(array.geometry(), item_size(array.dtype));
  array.check_alignment(label);
  array.owner_ = Py_NewRef(object);
  array.is_cuda_interface_ = true;
  return array;
}

std::uintptr_t cuda_interface_stream(PyObject* object, const Device& device) {
  const auto given = py::reinterpret_borrow<py::object>(object);
  return stream_of(given, given.attr(kAttribute), device);
}

}  // namespace fusestep::arrays
