#include "arrays/array.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "arrays/rows.h"
#include "arrays/samples.h"
#include "bind/register.h"
#include "core/blocks.h"
#include "core/errors.h"
#include "core/half.h"
#include "cpu/state_blocks.h"

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

// State in 8 bits, for state dicts.
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

py::tuple encode_state(const Floats& values, bool is_signed) {
  const std::int64_t size = values.size();
  Bytes codes(size), powers(blocks_of(size));
  cpu::encode_state({values.data(), static_cast<std::size_t>(size)}, is_signed,
                    codes.mutable_data(), powers.mutable_data());
  return py::make_tuple(codes, powers);
}

Floats decode_state(const Bytes& codes, const Bytes& powers, bool is_signed) {
  if (powers.size() != blocks_of(codes.size()))
    throw ValueError("there are " + std::to_string(powers.size()) + " powers for " +
                     std::to_string(codes.size()) + " codes; expected " +
                     std::to_string(blocks_of(codes.size())));
  Floats values(codes.size());
  cpu::decode_state({codes.data(), static_cast<std::size_t>(codes.size())}, powers.data(),
                    is_signed, values.mutable_data());
  return values;
}

// float32 numbers whose rounding to 16 bits is that of these.
Floats round_to_odd(const py::array_t<double, py::array::c_style>& values) {
  Floats rounded(std::vector<py::ssize_t>(values.shape(), values.shape() + values.ndim()));
  std::transform(values.data(), values.data() + values.size(), rounded.mutable_data(),
                 [](double x) { return fusestep::round_to_odd(x); });
  return rounded;
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
  module.def("encode_state", &encode_state, py::arg("values"), py::arg("is_signed"));
  module.def("decode_state", &decode_state, py::arg("codes"), py::arg("powers"),
             py::arg("is_signed"));
  module.def("round_to_odd", &round_to_odd, py::arg("values"));
  module.attr("elements_of_block") = kBlockElements;
  module.def("describe_array", &describe, py::arg("array"), py::arg("name"));
  module.def(
      "is_array", [](const py::object& object) { return arrays::is_array(object.ptr()); },
      py::arg("object"));
}

}  // namespace fusestep::bind
