#include "arrays/exchange.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arrays/cuda_driver.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";

bool publishes_table(PyTypeObject* type) {
  const py::object attributes = py::handle(reinterpret_cast<PyObject*>(type)).attr("__dict__");
  if (attributes.contains(kAttribute)) return true;
  return std::string_view(type->tp_name) == "Parameter" && type->tp_base &&
         publishes_table(type->tp_base) &&
         py::str(attributes["__module__"]).cast<std::string>() == "torch.nn.parameter";
}

const dlpack::ExchangeApi* find_table(PyTypeObject* type) {
  if (!publishes_table(type)) return nullptr;
  const py::object capsule = py::handle(reinterpret_cast<PyObject*>(type)).attr(kAttribute);
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeApiName)) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApiName));
  while (api && api->major != 1) api = api->older;
  return api && api->read ? api : nullptr;
}

struct Element {
  DType dtype;
  int components;  // 2 for a complex number
};

std::optional<Element> element_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return {};
  const int components = type.code == dlpack::kComplex ? 2 : 1;
  if (type.code == dlpack::kBfloat && type.bits == 16) return Element{DType::bfloat16, 1};
  if (type.code == dlpack::kUnsigned && type.bits == 8) return Element{DType::bits8, 1};
  if ((type.code == dlpack::kInt || type.code == dlpack::kUnsigned) && type.bits == 16)
    return Element{DType::bits16, 1};
  if (type.code != dlpack::kFloat && type.code != dlpack::kComplex) return {};
  switch (type.bits / components) {
    case 64: return Element{DType::float64, components};
    case 32: return Element{DType::float32, components};
    case 16: return Element{DType::float16, components};
    default: return {};
  }
}

Element expected_element(const dlpack::DataType& type, Expected expected, const Label& label) {
  const std::optional<Element> element = element_of(type);
  const bool is_kind = element && is_float(element->dtype) == (expected != Expected::bits);
  if (is_kind && (element->components == 1 || expected == Expected::complex_as_real))
    return *element;
  throw TypeError(label.text() + " has a dtype of DLPack code " + std::to_string(type.code) + ", " +
                  std::to_string(type.bits) + " bits; expected " + dtypes_text(expected));
}

// Memory of a GPU that is not NVIDIA's, for instance, is nothing that we know.
std::optional<Device> known_device(const dlpack::Device& device) {
  switch (device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost: return Device{};
    case dlpack::kCuda:
    case dlpack::kCudaManaged: return Device{Device::cuda, device.id};
    default: return {};
  }
}

[[noreturn]] void refuse_shape(const Label& label) {
  throw TypeError(label.text() + " was exported with an impossible shape or no data");
}

bool says_yes(PyObject* object, const char* method) {
  const py::handle tensor(object);
  return py::hasattr(tensor, method) && tensor.attr(method)().cast<bool>();
}

}  // namespace

void check_plausible(std::span<const std::int64_t> shape, const void* data, const Label& label) {
  constexpr std::int64_t kMostElements = std::int64_t{1} << 56;
  std::int64_t size = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0 || (extent > 0 && size > kMostElements / extent)) refuse_shape(label);
    size *= extent;
  }
  if (size > 0 && !data) refuse_shape(label);
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  // A reference to each type is kept: another type must not get its address.
  static auto* known = new std::vector<std::pair<PyTypeObject*, const dlpack::ExchangeApi*>>;
  for (const auto& [known_type, api] : *known)
    if (known_type == type) return api;
  const dlpack::ExchangeApi* api = find_table(type);
  if (api) {
    Py_INCREF(type);
    known->emplace_back(type, api);
  }
  return api;
}

Array from_exchange(PyObject* object, const dlpack::ExchangeApi& api, const Label& label,
                    Expected expected) {
  dlpack::Tensor tensor;
  if (api.read(object, &tensor) != 0) {  // sparse, on a device without memory, ...
    const py::error_already_set error;
    const auto reason = py::str(error.value()).cast<std::string>();
    throw TypeError(label.text() +
                    " cannot be exported through DLPack: " + reason.substr(0, reason.find('\n')));
  }
  Array array = from_tensor(tensor, Py_NewRef(object), expected, label);
  array.api_ = &api;
  array.stream = array.current_stream();
  if (is_lazily_negated(object, array))
    throw ValueError(label.text() + " has torch's negative bit set; pass its .resolve_neg()");
  return array;
}

Array from_tensor(const dlpack::Tensor& tensor, PyObject* owner, Expected expected,
                  const Label& label) {
  Array array;
  array.owner_ = owner;
  array.describe(tensor, expected, label);
  array.writable = true;
  return array;
}

bool view_like(const Array& like, const dlpack::Tensor& tensor, PyObject* owner, Array& view) {
  if (!like.has_geometry_of(tensor) || known_device(tensor.device) != like.device ||
      (like.size > 0 && !tensor.data))
    return false;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view.device = like.device;
  view.dtype = like.dtype;
  view.shape_ = like.shape_;
  view.strides_ = like.strides_;
  view.ndim_ = like.ndim_;
  view.size = like.size;
  view.c_contiguous = like.c_contiguous;
  view.writable = true;
  view.owner_ = owner;
  return true;
}

void Array::describe(const dlpack::Tensor& tensor, Expected expected, const Label& label) {
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  if (tensor.ndim < 0 || (tensor.ndim > 0 && !tensor.shape)) refuse_shape(label);
  check_plausible({tensor.shape, ndim}, tensor.data, label);
  device = device_of(tensor.device, label);
  const Element element = expected_element(tensor.dtype, expected, label);
  dtype = element.dtype;
  data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  owned_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (element.components > 1) owned_.push_back(element.components);
  ndim_ = owned_.size();
  owned_.resize(2 * ndim_);

  const std::int64_t item = item_size(dtype);
  size = 1;
  for (std::size_t axis = ndim_; axis-- > 0; size *= owned_[axis]) {
    const bool is_component = axis == static_cast<std::size_t>(tensor.ndim);
    const bool in_c_order = is_component || !tensor.strides;
    owned_[ndim_ + axis] =
        in_c_order ? size * item : tensor.strides[axis] * item * element.components;
  }
  shape_ = owned_.data();
  strides_ = owned_.data() + ndim_;
  c_contiguous = is_c_contiguous(geometry(), item);
  check_alignment(label);
}

bool Array::has_geometry_of(const dlpack::Tensor& tensor) const {
  const std::optional<Element> element = element_of(tensor.dtype);
  if (!element || element->dtype != dtype || !tensor.strides) return false;
  const std::int64_t item = item_size(dtype);
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  const bool is_complex = element->components == 2;
  if (ndim_ != ndim + is_complex) return false;
  if (is_complex && (shape_[ndim] != 2 || strides_[ndim] != item)) return false;
  for (std::size_t axis = 0; axis < ndim; ++axis)
    if (tensor.shape[axis] != shape_[axis] ||
        tensor.strides[axis] * item * element->components != strides_[axis])
      return false;
  return true;
}

bool Array::is_view_of(const dlpack::Tensor& tensor) const {
  return static_cast<std::byte*>(tensor.data) + tensor.byte_offset == data &&
         known_device(tensor.device) == device && has_geometry_of(tensor);
}

Device device_of(const dlpack::Device& device, const Label& label) {
  const std::optional<Device> known = known_device(device);
  if (!known)
    throw TypeError(label.text() + " is on a device of DLPack type " + std::to_string(device.type) +
                    "; expected memory of the CPU or of an NVIDIA GPU");
  if (known->kind == Device::cuda && !has_cuda_driver())
    throw TypeError(label.text() + " is on " + name_of(*known) +
                    "; this build of fusestep has no CUDA kernels (see docs/gpu.md)");
  return *known;
}

std::optional<std::uintptr_t> exchange_stream(const dlpack::ExchangeApi& api,
                                              const Device& device) {
  if (!api.current_stream) return {};
  void* stream = nullptr;
  if (api.current_stream(dlpack::kCuda, device.index, &stream) == 0)
    return reinterpret_cast<std::uintptr_t>(stream);
  PyErr_Clear();
  return {};
}

bool is_lazily_negated(PyObject* object, const Array& array) {
  return (!array.c_contiguous || array.size <= 1) && says_yes(object, "is_neg");
}

}  // namespace fusestep::arrays
