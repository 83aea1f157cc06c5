#include "rules/row_history.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "arrays/rows.h"
#include "bind/register.h"
#include "core/errors.h"
#include "gradients/rows.h"

namespace py = pybind11;

namespace fusestep::bind {

using rules::RowHistory;

py::object missed_steps(const RowHistory& history) {
  if (!history.has_missed_steps()) return py::none();
  const std::vector<std::int64_t> missed = history.all_missed();
  return py::make_tuple(
      py::array_t<std::int64_t>(static_cast<py::ssize_t>(missed.size()), missed.data()),
      history.steps());
}

void restore(RowHistory& history, const rules::AnyRule& rule, DType compute, std::size_t states,
             const RowNumbers& missed, const std::vector<std::vector<double>>& steps) {
  history.restore(rule, compute, states, steps,
                  {missed.data(), static_cast<std::size_t>(missed.size())});
}

std::vector<std::int64_t> read_row_numbers(const py::handle& indices,
                                           const arrays::Array& parameter) {
  static const std::string kName = "catch_up";
  return arrays::read_row_numbers(indices.ptr(), parameter, {"the row indices for ", kName});
}

void register_row_history(py::module_& module) {
  using namespace py::literals;
  py::class_<RowHistory, std::shared_ptr<RowHistory>>(module, "RowHistory")
      .def(py::init<std::int64_t>(), "rows"_a)
      .def_property_readonly("has_missed_steps", &RowHistory::has_missed_steps)
      .def("missed_steps", &missed_steps)
      .def(
          "restore",
          [](RowHistory& self, const std::string& rule_name,
             const std::map<std::string, double>& options, const RowNumbers& missed,
             const std::vector<std::vector<double>>& steps) {
            const auto rule = make_rule(rule_name, options);
            restore(self, *rule, DType::float32, rule->state_names().size(), missed, steps);
          },
          "rule"_a, "options"_a, "missed"_a, "steps"_a)
      .def("resize", &RowHistory::resize, "rows"_a);

  module.def(
      "check_row_numbers",
      [](const py::object& indices, std::int64_t rows) {
        gradients::Rows().plan(read_row_numbers(indices), rows);
      },
      "indices"_a, "rows"_a);
}

}  // namespace fusestep::bind
