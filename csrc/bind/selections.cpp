#include "bind/selections.h"

#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bind/register.h"
#include "selections/blocks.h"

namespace py = pybind11;

namespace fusestep::bind {
namespace {

// `mask` is an array of booleans.
Where select_mask(const py::array& mask, bool tracks) {
  Where where{{.kind = selections::Choice::Kind::mask, .tracks = tracks}, mask};
  auto& seen = where.choice.mask;
  seen.data = static_cast<std::byte*>(const_cast<void*>(mask.data()));
  seen.shape.assign(mask.shape(), mask.shape() + mask.ndim());
  seen.strides.assign(mask.strides(), mask.strides() + mask.ndim());
  return where;
}

}  // namespace

py::object block_progress(const rules::BlockProgress* progress) {
  if (!progress || !progress->is_split()) return py::none();
  const auto array = [](const auto& values) {
    using Value = typename std::decay_t<decltype(values)>::value_type;
    return py::array_t<Value>(static_cast<py::ssize_t>(values.size()), values.data());
  };
  return py::make_tuple(progress->block(), array(progress->steps()), array(progress->products()));
}

void register_selections(py::module_& module) {
  using namespace py::literals;
  py::class_<Where>(module, "Where")
      .def_static("mask", &select_mask, "mask"_a, "tracks"_a)
      .def_static(
          "random_blocks",
          [](double fraction, std::int64_t block, bool tracks) {
            return Where{{.kind = selections::Choice::Kind::random_blocks,
                          .tracks = tracks,
                          .fraction = fraction,
                          .block = block},
                         {}};
          },
          "fraction"_a, "block"_a, "tracks"_a)
      .def_static(
          "cyclic_blocks",
          [](std::int64_t blocks, bool tracks) {
            return Where{{.kind = selections::Choice::Kind::cyclic_blocks,
                          .tracks = tracks,
                          .blocks = blocks},
                         {}};
          },
          "blocks"_a, "tracks"_a)
      .def_static(
          "top",
          [](double fraction, bool by_update, bool tracks) {
            using Size = selections::Choice::Size;
            return Where{{.kind = selections::Choice::Kind::top,
                          .tracks = tracks,
                          .fraction = fraction,
                          .by = by_update ? Size::of_update : Size::of_gradient},
                         {}};
          },
          "fraction"_a, "by_update"_a, "tracks"_a);

  using rules::BlockProgress;
  py::class_<BlockProgress, std::shared_ptr<BlockProgress>>(module, "BlockProgress")
      .def(py::init())
      .def_property_readonly("is_split", &BlockProgress::is_split)
      .def("counts", [](const BlockProgress& self) { return block_progress(&self); })
      .def("restore", &BlockProgress::restore, "size"_a, "block"_a, "steps"_a, "products"_a)
      .def("resize", &BlockProgress::resize, "size"_a);

  module.def(
      "draw_blocks",
      [](std::int64_t blocks, double fraction, std::uint64_t seed, std::int64_t step,
         std::size_t parameter) {
        return selections::draw_blocks(blocks, fraction, {seed, step, parameter});
      },
      "blocks"_a, "fraction"_a, "seed"_a, "step"_a, "parameter"_a);
}

}  // namespace fusestep::bind
