#include "arrays/array.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <utility>

#include "arrays/cuda_interface.h"
#include "arrays/dlpack.h"
#include "arrays/exchange.h"
#include "arrays/numpy.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {

Array Array::dense(std::byte* data, DType dtype, std::span<const std::int64_t> shape,
                   const Device& device) {
  Array array;
  array.data = data;
  array.dtype = dtype;
  array.device = device;
  array.writable = array.c_contiguous = true;
  array.size = std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies());
  const std::vector<std::int64_t> strides = c_strides(shape, item_size(dtype));
  array.owned_.assign(shape.begin(), shape.end());
  array.owned_.insert(array.owned_.end(), strides.begin(), strides.end());
  array.ndim_ = shape.size();
  array.shape_ = array.owned_.data();
  array.strides_ = array.shape_ + array.ndim_;
  return array;
}

void Array::swap(Array& other) noexcept {
  std::swap(data, other.data);
  std::swap(device, other.device);
  std::swap(dtype, other.dtype);
  std::swap(writable, other.writable);
  std::swap(c_contiguous, other.c_contiguous);
  std::swap(size, other.size);
  std::swap(stream, other.stream);
  std::swap(shape_, other.shape_);
  std::swap(strides_, other.strides_);
  std::swap(ndim_, other.ndim_);
  owned_.swap(other.owned_);
  std::swap(owner_, other.owner_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(api_, other.api_);
  std::swap(managed_, other.managed_);
  std::swap(delete_managed_, other.delete_managed_);
  std::swap(is_cuda_interface_, other.is_cuda_interface_);
}

void Array::release() noexcept {
  Py_XDECREF(owner_);
  Py_XDECREF(descriptor_);
  if (managed_ && delete_managed_) delete_managed_(managed_);
  owner_ = descriptor_ = nullptr;
  managed_ = nullptr;
}

void Array::pin() {
  if (owned_.empty()) {
    owned_.assign(shape_, shape_ + ndim_);
    owned_.insert(owned_.end(), strides_, strides_ + ndim_);
  }
  shape_ = owned_.data();
  strides_ = owned_.data() + ndim_;
  if (owner_ && is_numpy(owner_)) descriptor_ = Py_NewRef(numpy_fields(owner_).descriptor);
}

bool Array::is_current() const {
  if (api_) {
    dlpack::Tensor now;
    if (api_->read(owner_, &now) == 0) return is_view_of(now);
    PyErr_Clear();  // it has been moved to where there is no memory
    return false;
  }
  if (managed_) return exporter_is_current(owner_, *this);
  if (is_cuda_interface_) return true;  // such arrays are never given other memory
  const NumpyFields now = numpy_fields(owner_);
  return now.data == data && now.writable == writable && now.descriptor == descriptor_ &&
         std::ranges::equal(geometry().shape, std::span(now.shape, now.ndim)) &&
         std::ranges::equal(geometry().strides, std::span(now.strides, now.ndim));
}

std::uintptr_t Array::current_stream() const {
  if (device.kind == Device::cpu) return 0;
  if (api_)
    if (const auto stream = exchange_stream(*api_, device)) return *stream;
  if (is_cuda_interface_) return cuda_interface_stream(owner_, device);
  return exporter_stream(owner_, device);
}

bool Array::is_lent_for_the_call() const {
  return device.kind == Device::cuda && managed_ && !is_torch(owner_);
}

bool Array::is_of_library_of(const Array& other) const {
  if (api_ || other.api_) return api_ == other.api_;
  return Py_TYPE(owner_) == Py_TYPE(other.owner_) && (is_cupy(owner_) || is_torch(owner_));
}

void Array::check_alignment(const Label& label) const {
  if (device.kind == Device::cpu || size == 0) return;
  const std::int64_t item = item_size(dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(item) == 0;
  for (std::size_t axis = 0; axis < ndim_; ++axis)
    aligned = aligned && (shape_[axis] == 1 || strides_[axis] % item == 0);
  if (!aligned)
    throw ValueError(label.text() + " is not aligned to its elements, which a GPU cannot read");
}

Array::Interval Array::interval() const {
  auto first = reinterpret_cast<std::uintptr_t>(data);
  if (size == 0) return {first, first};
  auto last = first + static_cast<std::uintptr_t>(item_size(dtype));
  if (c_contiguous) return {first, first + static_cast<std::uintptr_t>(size * item_size(dtype))};
  for (std::size_t axis = 0; axis < ndim_; ++axis) {
    const std::int64_t reach = strides_[axis] * (shape_[axis] - 1);
    (reach < 0 ? first : last) += static_cast<std::uintptr_t>(reach);
  }
  return {first, last};
}

const char* dtypes_text(Expected expected) {
  return expected == Expected::bits ? "uint8, int16 or uint16"
                                    : "float64, float32, float16 or bfloat16";
}

namespace {

Array view(PyObject* object, const Label& label, Expected expected) {
  if (is_numpy(object)) return from_numpy(object, label, expected);
  if (is_numpy_scalar(object)) return from_numpy_scalar(object, label);
  if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object)))
    return from_exchange(object, *api, label, expected);
  if (has_cuda_interface(object)) return from_cuda_interface(object, label, expected);
  if (PyObject_HasAttrString(object, "__dlpack__")) return from_dlpack(object, label, expected);
  throw TypeError(label.text() + " is a " + Py_TYPE(object)->tp_name +
                  "; expected a NumPy or CuPy array, a torch tensor, or another array that " +
                  "supports DLPack");
}

}  // namespace

Array from_object(PyObject* object, const Label& label) {
  return view(object, label, Expected::floats);
}

Array bits_from_object(PyObject* object, const Label& label) {
  return view(object, label, Expected::bits);
}

bool is_array(PyObject* object) {
  return is_numpy(object) || PyObject_HasAttrString(object, "__dlpack__") ||
         has_cuda_interface(object);
}

namespace {

// True where counting alone shows that two arrays have no byte in common: all elements of both lie
// at multiples of one distance, and those of one always in the gaps of the other (columns of a
// matrix, real and imaginary parts).
bool interleave(const Array& a, const Array& b) {
  std::int64_t distance = 0;
  for (const Array* array : {&a, &b}) {
    const auto [shape, strides] = array->geometry();
    for (std::size_t axis = 0; axis < shape.size(); ++axis)
      if (shape[axis] > 1) distance = std::gcd(distance, strides[axis]);
  }
  if (distance == 0) return false;
  std::int64_t offset = (b.data - a.data) % distance;
  if (offset < 0) offset += distance;
  return offset >= item_size(a.dtype) && distance - offset >= item_size(b.dtype);
}

}  // namespace

bool share_memory(const Array& a, const Array& b) {
  const auto [a_first, a_last] = a.interval();
  const auto [b_first, b_last] = b.interval();
  if (a.size == 0 || b.size == 0 || a_last <= b_first || b_last <= a_first) return false;
  if (a.c_contiguous && b.c_contiguous) return true;
  if (interleave(a, b)) return false;
  // Any other pair of views: an integer-programming question that NumPy has solved.
  const auto view = [](const Array& array) {
    const py::capsule owner(array.data);  // so that NumPy does not copy
    const auto [shape, strides] = array.geometry();
    const py::dtype dtype("V" + std::to_string(item_size(array.dtype)));
    return py::array(dtype, std::vector<py::ssize_t>(shape.begin(), shape.end()),
                     std::vector<py::ssize_t>(strides.begin(), strides.end()), array.data, owner);
  };
  return py::module_::import("numpy").attr("shares_memory")(view(a), view(b)).cast<bool>();
}

std::string shape_text(const Array& array) { return shape_text(array.geometry().shape); }

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "(";
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace fusestep::arrays
