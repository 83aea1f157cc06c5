// Arrays of other libraries, through __dlpack__.

#include <pybind11/pybind11.h>

#include "arrays/dlpack_abi.h"
#include "arrays/numpy.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

constexpr const char* kName = "dltensor";
constexpr const char* kVersionedName = "dltensor_versioned";

// torch refuses to export what requires a gradient; its .detach() is the same memory.
py::object detached(PyObject* object) {
  const auto handle = py::reinterpret_borrow<py::object>(object);
  const py::object requires_grad = py::getattr(handle, "requires_grad", py::none());
  return PyObject_IsTrue(requires_grad.ptr()) == 1 ? py::object(handle.attr("detach")()) : handle;
}

// torch before 2.8 speaks the old DLPack, and its memory can be written. JAX speaks it too, and its
// arrays are immutable: who else cannot say is taken to be like JAX.
bool is_torch(PyObject* object) {
  const py::object module =
      py::getattr(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__module__", py::str());
  return py::isinstance<py::str>(module) && module.cast<std::string>().starts_with("torch");
}

py::object export_capsule(PyObject* object, const Label& label) {
  using namespace py::literals;
  try {
    const py::object exporter = detached(object);
    const auto device = exporter.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    if (device.first != dlpack::kCpu && device.first != dlpack::kCudaHost)
      throw TypeError(label.text() + " is not in CPU memory (DLPack device type " +
                      std::to_string(device.first) + "); this build updates CPU arrays only");
    const py::object dlpack = exporter.attr("__dlpack__");
    try {
      return dlpack("max_version"_a = py::make_tuple(1, 0));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      return dlpack();  // an exporter older than version 1
    }
  } catch (py::error_already_set& error) {
    throw TypeError(label.text() + " cannot be exported through DLPack: " + error.what());
  }
}

template <class Managed>
void destroy(void* managed) {
  auto* tensor = static_cast<Managed*>(managed);
  if (tensor->deleter) tensor->deleter(tensor);
}

DType dtype_of(const dlpack::Tensor& tensor, const Label& label) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (lanes == 1 && code == dlpack::kFloat && bits == 64) return DType::float64;
  if (lanes == 1 && code == dlpack::kFloat && bits == 32) return DType::float32;
  if (lanes == 1 && code == dlpack::kFloat && bits == 16) return DType::float16;
  if (lanes == 1 && code == dlpack::kBfloat && bits == 16) return DType::bfloat16;
  throw TypeError(label.text() + " has a dtype of DLPack code " + std::to_string(code) + ", " +
                  std::to_string(bits) + " bits; expected float64, float32, float16 or bfloat16");
}

}  // namespace

Array from_dlpack(PyObject* object, const Label& label) {
  const py::object capsule = export_capsule(object, label);
  Array array;
  const dlpack::Tensor* tensor = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), kVersionedName)) {
    auto* managed =
        static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kVersionedName));
    if (managed->major != 1)
      throw TypeError(label.text() + " speaks DLPack version " + std::to_string(managed->major) +
                      "; expected 1");
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    array.managed_ = managed;
    array.delete_managed_ = destroy<dlpack::ManagedVersioned>;
    array.writable = (managed->flags & (dlpack::kReadOnly | dlpack::kCopied)) == 0;
    tensor = &managed->tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), kName)) {
    auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), kName));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    array.managed_ = managed;
    array.delete_managed_ = destroy<dlpack::Managed>;
    array.writable = is_torch(object);  // before version 1, DLPack cannot say
    tensor = &managed->tensor;
  } else {
    throw TypeError(label.text() + ": __dlpack__ did not return a DLPack capsule");
  }

  array.dtype = dtype_of(*tensor, label);
  array.data = static_cast<std::byte*>(tensor->data) + tensor->byte_offset;
  array.ndim_ = static_cast<std::size_t>(tensor->ndim);
  array.owned_.assign(tensor->shape, tensor->shape + tensor->ndim);
  array.owned_.resize(2 * array.ndim_);
  array.size = 1;
  for (std::size_t axis = array.ndim_; axis-- > 0; array.size *= array.owned_[axis]) {
    const std::int64_t stride = tensor->strides ? tensor->strides[axis] : array.size;
    array.owned_[array.ndim_ + axis] = stride * item_size(array.dtype);
  }
  array.shape_ = array.owned_.data();
  array.strides_ = array.owned_.data() + array.ndim_;
  array.c_contiguous = is_c_contiguous(array.geometry(), item_size(array.dtype));
  return array;
}

}  // namespace fusestep::arrays
