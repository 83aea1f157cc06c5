// The second extension module: CUDA kernels, and no more Python than it takes to hand them over.

#include <pybind11/pybind11.h>

#include "cuda/driver.h"
#include "cuda/runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
  using namespace fusestep;
  module.doc() = "fusestep's kernels for NVIDIA GPUs. Private: use fusestep.";
  module.attr("driver") = py::capsule(&cuda::driver(), cuda::Driver::kCapsule);
  module.def("check_available", &cuda::check_available);
  module.def("device_count", [] {
    cuda::check_available();
    return cuda::device_count();
  });
  module.def("driver_version", &cuda::driver_version);
  const cuda::Build build = cuda::build();
  module.attr("toolkit_version") = build.toolkit;
  module.attr("architectures") = build.architectures;
  module.attr("is_simulated") = build.simulated;
}
