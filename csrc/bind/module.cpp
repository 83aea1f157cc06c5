#include "bind/register.h"

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "fusestep's kernels for the CPU. Private: use fusestep.";
  fusestep::bind::register_errors(module);
  fusestep::bind::register_arrays(module);
  fusestep::bind::register_row_history(module);
  fusestep::bind::register_selections(module);
  fusestep::bind::register_optimizer(module);
  fusestep::bind::register_linear(module);
  fusestep::bind::register_torch(module);
  fusestep::bind::register_runtime(module);
}
