#include "arrays/dlpack.h"

#include <pybind11/pybind11.h>

#include "arrays/dlpack_abi.h"
#include "arrays/exchange.h"
#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

constexpr const char* kName = "dltensor";
constexpr const char* kVersionedName = "dltensor_versioned";

// torch before 2.8 speaks the old DLPack, and its memory can be written. JAX speaks it too, and its
// arrays are immutable: who else cannot say is taken to be like JAX.
bool is_torch(PyObject* object) {
  const py::object module =
      py::getattr(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__module__", py::str());
  return py::isinstance<py::str>(module) && module.cast<std::string>().starts_with("torch");
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

py::object call_dlpack(const py::object& exporter) {
  using namespace py::literals;
  const py::object dlpack = exporter.attr("__dlpack__");
  try {
    return dlpack("max_version"_a = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return dlpack();  // an exporter older than version 1
  }
}

// Errors of the exporter that are about the array become a sentence that names it; others (a
// KeyboardInterrupt, say) go through as they are.
py::object export_capsule(PyObject* object, const Label& label) {
  try {
    const py::object exporter = exporter_of(object, label);
    const py::tuple device = exporter.attr("__dlpack_device__")();
    check_device(device[0].cast<std::int32_t>(), label);
    return call_dlpack(exporter);
  } catch (py::error_already_set& error) {
    for (PyObject* kind : {PyExc_TypeError, PyExc_BufferError, PyExc_AttributeError,
                           PyExc_ValueError, PyExc_NotImplementedError}) {
      if (error.matches(kind))
        throw TypeError(label.text() + " cannot be exported through DLPack: " +
                        py::str(error.value()).cast<std::string>());
    }
    throw;
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

  array.describe(*tensor, Complex::refused, label);
  array.owner_ = Py_NewRef(object);
  return array;
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
