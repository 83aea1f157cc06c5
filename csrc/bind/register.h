// The parts of the extension module, one function each.
#pragma once

#include <pybind11/pybind11.h>

namespace fusestep::bind {

void register_errors(pybind11::module_& module);
void register_arrays(pybind11::module_& module);
void register_optimizer(pybind11::module_& module);
void register_runtime(pybind11::module_& module);

}  // namespace fusestep::bind
