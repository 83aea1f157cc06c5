#include "arrays/cuda_driver.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

// Null where the build has none. Another error while it is imported goes through.
const cuda::Driver* find_driver() {
  try {
    const py::object driver = py::module_::import("fusestep._cuda").attr("driver");
    return static_cast<const cuda::Driver*>(
        PyCapsule_GetPointer(driver.ptr(), cuda::Driver::kCapsule));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ModuleNotFoundError)) throw;
    return nullptr;
  }
}

// Guarded by the GIL, and not by a static's own lock: importing may let another thread run, which
// would wait for that lock with the GIL in its hands.
const cuda::Driver* found_driver() {
  static const cuda::Driver* driver = nullptr;
  static bool has_looked = false;
  if (!has_looked) {
    driver = find_driver();
    has_looked = true;
  }
  return driver;
}

}  // namespace

bool has_cuda_driver() { return found_driver() != nullptr; }

const cuda::Driver& cuda_driver() {
  if (const cuda::Driver* driver = found_driver()) return *driver;
  throw std::runtime_error("this build of fusestep has no CUDA kernels (see docs/gpu.md)");
}

}  // namespace fusestep::arrays
