#include "arrays/dlpack.h"

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

#include "arrays/dlpack_abi.h"
#include "arrays/exchange.h"
#include "arrays/foreign_errors.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

constexpr const char* kName = "dltensor";
constexpr const char* kVersionedName = "dltensor_versioned";

bool is_of_module(PyObject* object, std::string_view name) {
  const py::object module =
      py::getattr(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__module__", py::str());
  return py::isinstance<py::str>(module) && module.cast<std::string>().starts_with(name);
}

// What is exported. torch refuses to export what requires a gradient, and its export does not say
// that the numbers in memory are to be negated (as in z.conj().imag). .detach() is the same memory
// in a tensor of its own, which nobody can give other memory.
py::object exporter_of(PyObject* object, const Label& label) {
  auto exporter = py::reinterpret_borrow<py::object>(object);
  if (!is_torch(object) || !py::hasattr(exporter, "detach")) return exporter;
  if (py::hasattr(exporter, "is_neg") && exporter.attr("is_neg")().cast<bool>())
    throw ValueError(label.text() + " has torch's negative bit set; pass its .resolve_neg()");
  return exporter.attr("detach")();
}

// On a GPU, an exporter is told on which stream its array will be used, and sees to it that the
// stream waits for what is still to be computed: the default stream, which exporter_stream() names,
// too. torch need not wait: a step runs on its own stream.
constexpr int kDefaultStream = 1, kNoWaiting = -1;

py::object call_dlpack(const py::object& exporter, const Device& device) {
  using namespace py::literals;
  const py::object dlpack = exporter.attr("__dlpack__");
  py::dict arguments;
  if (device.kind == Device::cuda)
    arguments["stream"] = is_torch(exporter.ptr()) ? kNoWaiting : kDefaultStream;
  try {
    return dlpack("max_version"_a = py::make_tuple(1, 0), **arguments);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return dlpack(**arguments);  // an exporter older than version 1
  }
}

py::object export_capsule(PyObject* object, const Label& label) {
  try {
    const py::object exporter = exporter_of(object, label);
    const py::tuple device = exporter.attr("__dlpack_device__")();
    return call_dlpack(
        exporter,
        device_of({device[0].cast<std::int32_t>(), device[1].cast<std::int32_t>()}, label));
  } catch (const py::error_already_set& error) {
    rethrow_as_type_error(error,
                          {PyExc_TypeError, PyExc_BufferError, PyExc_AttributeError,
                           PyExc_ValueError, PyExc_NotImplementedError},
                          label.text() + " cannot be exported through DLPack: ");
  } catch (py::cast_error&) {
    throw TypeError(label.text() + ": __dlpack_device__ did not return a pair of numbers");
  }
}

template <class Managed>
void destroy(void* managed) {
  auto* tensor = static_cast<Managed*>(managed);
  if (tensor->deleter) tensor->deleter(tensor);
}

}  // namespace

bool is_torch(PyObject* object) { return is_of_module(object, "torch"); }

bool is_cupy(PyObject* object) { return is_of_module(object, "cupy"); }

Array from_dlpack(PyObject* object, const Label& label, Expected expected) {
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
    // Before version 1, DLPack cannot say. torch spoke that until 2.8, and its memory can be
    // written; JAX does, and its arrays are immutable: all others are taken to be like JAX.
    array.writable = is_torch(object);
    tensor = &managed->tensor;
  } else {
    throw TypeError(label.text() + ": __dlpack__ did not return a DLPack capsule");
  }

  array.describe(*tensor, expected, label);
  array.owner_ = Py_NewRef(object);
  array.stream = array.current_stream();
  return array;
}

std::uintptr_t exporter_stream(PyObject* exporter, const Device& device) {
  if (!is_torch(exporter)) return 0;
  const py::object stream =
      py::module_::import("torch").attr("cuda").attr("current_stream")(device.index);
  return stream.attr("cuda_stream").cast<std::uintptr_t>();
}

bool exporter_is_current(PyObject* object, const Array& array) {
  const auto exporter = py::reinterpret_borrow<py::object>(object);
  if (!is_torch(object) || !py::hasattr(exporter, "data_ptr")) return true;
  const auto shape = array.geometry().shape;
  const py::tuple now = exporter.attr("shape");
  bool same = now.size() == shape.size();
  for (std::size_t axis = 0; same && axis < shape.size(); ++axis)
    same = now[axis].cast<std::int64_t>() == shape[axis];
  const auto address = exporter.attr("data_ptr")().cast<std::uintptr_t>();
  return same && (array.size == 0 || address == reinterpret_cast<std::uintptr_t>(array.data));
}

}  // namespace fusestep::arrays
