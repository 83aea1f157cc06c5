// The parts of the extension module, one function each.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <string>

#include "rules/any_rule.h"

namespace fusestep::bind {

void register_errors(pybind11::module_& module);
void register_arrays(pybind11::module_& module);
void register_optimizer(pybind11::module_& module);
void register_runtime(pybind11::module_& module);
void register_torch(pybind11::module_& module);

// A rule by name, with its options.
std::unique_ptr<rules::AnyRule> make_rule(const std::string& name,
                                          const std::map<std::string, double>& options);

}  // namespace fusestep::bind
