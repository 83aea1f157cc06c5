// The parts of the extension module, one function each.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "arrays/array.h"
#include "core/dtypes.h"
#include "rules/any_rule.h"
#include "rules/row_history.h"

namespace fusestep::bind {

void register_errors(pybind11::module_& module);
void register_arrays(pybind11::module_& module);
void register_linear(pybind11::module_& module);
void register_optimizer(pybind11::module_& module);
void register_row_history(pybind11::module_& module);
void register_selections(pybind11::module_& module);
void register_runtime(pybind11::module_& module);
void register_torch(pybind11::module_& module);

// A rule by name, with its options.
std::unique_ptr<rules::AnyRule> make_rule(const std::string& name,
                                          const std::map<std::string, double>& options);

// What rows have missed: (steps missed, for each row; what is known of each step), or None where
// all are up to date. And taken back, as RowHistory says.
pybind11::object missed_steps(const rules::RowHistory& history);
using RowNumbers = pybind11::array_t<std::int64_t, pybind11::array::c_style>;
void restore(rules::RowHistory& history, const rules::AnyRule& rule, DType compute,
             std::size_t states, const RowNumbers& missed,
             const std::vector<std::vector<double>>& steps);

// The rows that catch_up is given for a parameter; without one, for one on the CPU.
std::vector<std::int64_t> read_row_numbers(const pybind11::handle& indices,
                                           const arrays::Array& parameter = {});

}  // namespace fusestep::bind
