#include "arrays/array.h"

#include <pybind11/stl.h>

#include "arrays/rows.h"
#include "arrays/samples.h"
#include "bind/register.h"

namespace py = pybind11;

namespace fusestep::bind {
namespace {

py::tuple to_tuple(std::span<const std::int64_t> values) {
  py::tuple tuple(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) tuple[i] = values[i];
  return tuple;
}

// What Python needs to know of an array to allocate its state: address, dtype, shape, strides in
// bytes, and device.
py::tuple describe(const py::object& object, const std::string& name) {
  const arrays::Array array = arrays::from_object(object.ptr(), {"", name});
  const auto [shape, strides] = array.geometry();
  return py::make_tuple(reinterpret_cast<std::uintptr_t>(array.data), name_of(array.dtype),
                        to_tuple(shape), to_tuple(strides), name_of(array.device));
}

}  // namespace

void register_arrays(py::module_& module) {
  module.def(
      "set_rows_type", [](const py::type& type) { arrays::set_rows_type(type.ptr()); },
      py::arg("type"));
  module.def(
      "set_samples_types",
      [](const py::type& samples, const py::type& outer) {
        arrays::set_samples_types(samples.ptr(), outer.ptr());
      },
      py::arg("samples"), py::arg("outer"));
  module.def("describe_array", &describe, py::arg("array"), py::arg("name"));
  module.def(
      "is_array", [](const py::object& object) { return arrays::is_array(object.ptr()); },
      py::arg("object"));
}

}  // namespace fusestep::bind
