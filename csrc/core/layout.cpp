#include "core/layout.h"

#include <algorithm>
#include <cstdlib>

namespace fusestep {
namespace {

constexpr std::int64_t kTileSide = 32;

}  // namespace

bool is_c_contiguous(const Geometry& g, std::int64_t item) {
  // Of nothing, strides may be anything.
  if (std::ranges::find(g.shape, 0) != g.shape.end()) return true;
  std::int64_t expected = item;
  for (std::size_t axis = g.shape.size(); axis-- > 0;) {
    if (g.shape[axis] != 1 && g.strides[axis] != expected) return false;
    expected *= g.shape[axis];
  }
  return true;
}

std::vector<std::int64_t> c_strides(std::span<const std::int64_t> shape, std::int64_t item) {
  std::vector<std::int64_t> strides(shape.size());
  for (std::size_t axis = shape.size(); axis-- > 0; item *= shape[axis]) strides[axis] = item;
  return strides;
}

bool elements_are_disjoint(const Geometry& g, std::int64_t item) {
  std::vector<std::pair<std::int64_t, std::int64_t>> axes;  // |stride|, extent
  std::int64_t size = 1;
  for (std::size_t axis = 0; axis < g.shape.size(); ++axis) {
    size *= g.shape[axis];
    if (g.shape[axis] > 1) axes.emplace_back(std::abs(g.strides[axis]), g.shape[axis]);
  }
  if (size <= 1) return true;
  std::sort(axes.begin(), axes.end());

  std::int64_t span = item;  // bytes that the axes so far reach over
  bool nested = true;
  for (const auto& [stride, extent] : axes) {
    nested = nested && stride >= span;
    span += stride * (extent - 1);
  }
  if (nested) return true;
  if (axes.front().first == 0) return false;

  std::vector<std::int64_t> addresses{0};
  addresses.reserve(static_cast<std::size_t>(size));
  for (const auto& [stride, extent] : axes) {
    const std::size_t before = addresses.size();
    for (std::int64_t i = 1; i < extent; ++i)
      for (std::size_t k = 0; k < before; ++k) addresses.push_back(addresses[k] + i * stride);
  }
  std::sort(addresses.begin(), addresses.end());
  const auto closer_than_item = [&](std::int64_t a, std::int64_t b) { return b - a < item; };
  return std::adjacent_find(addresses.begin(), addresses.end(), closer_than_item) ==
         addresses.end();
}

void Iteration::plan(std::span<const Geometry> geometry, Order order) {
  const Geometry& parameter = geometry[0];
  operands = static_cast<int>(geometry.size());
  layout.reset();
  size = 1;
  for (const std::int64_t extent : parameter.shape) size *= extent;

  bool all_c = true;
  for (int i = 0; i < operands; ++i)
    all_c = all_c && is_c_contiguous(geometry[i], item_size(operand[i].dtype));
  if (all_c || size <= 1) return;

  StridedLayout strided;
  for (std::size_t axis = 0; axis < parameter.shape.size(); ++axis) {
    if (parameter.shape[axis] == 1) continue;
    TileAxis a{parameter.shape[axis], 1, 0, {}};
    for (int i = 0; i < operands; ++i) a.stride[i] = geometry[i].strides[axis];
    if (order == Order::memory && a.stride[0] < 0) {  // walk the parameter upwards in memory
      for (int i = 0; i < operands; ++i) {
        operand[i].data += a.stride[i] * (a.extent - 1);
        a.stride[i] = -a.stride[i];
      }
    }
    strided.axes_.push_back(a);
  }
  if (order == Order::memory)
    std::stable_sort(strided.axes_.begin(), strided.axes_.end(),
                     [](const auto& a, const auto& b) { return a.stride[0] > b.stride[0]; });

  std::vector<TileAxis> merged;  // innermost first
  for (auto outer = strided.axes_.rbegin(); outer != strided.axes_.rend(); ++outer) {
    bool runs_on = !merged.empty();
    for (int i = 0; runs_on && i < operands; ++i)
      runs_on = outer->stride[i] == merged.back().stride[i] * merged.back().extent;
    if (runs_on)
      merged.back().extent *= outer->extent;
    else
      merged.push_back(*outer);
  }
  std::reverse(merged.begin(), merged.end());
  strided.axes_ = std::move(merged);

  bool dense = strided.axes_.size() == 1;
  for (int i = 0; dense && i < operands; ++i)
    dense = strided.axes_[0].stride[i] == item_size(operand[i].dtype);
  if (dense) return;

  strided.cut_into_tiles(operands);
  layout = std::make_shared<const StridedLayout>(std::move(strided));
}

void StridedLayout::cut_into_tiles(int operands) {
  // Columns run along the parameter's innermost axis; rows along the innermost axis of the first
  // operand that disagrees, or else along the parameter's next axis.
  const int axes = static_cast<int>(axes_.size());
  column_axis_ = axes - 1;
  row_axis_ = axes >= 2 ? axes - 2 : column_axis_;
  for (int i = 1; i < operands; ++i) {
    const auto innermost =
        std::min_element(axes_.rbegin(), axes_.rend(), [i](const TileAxis& a, const TileAxis& b) {
          return std::abs(a.stride[i]) < std::abs(b.stride[i]);
        });
    const int axis = static_cast<int>(axes_.rend() - innermost) - 1;
    if (axis != column_axis_) {
      row_axis_ = axis;
      break;
    }
  }

  TileAxis& column = axes_[static_cast<std::size_t>(column_axis_)];
  TileAxis& row = axes_[static_cast<std::size_t>(row_axis_)];
  if (row_axis_ == column_axis_) {
    column.tile = std::min(column.extent, kTileSize);
  } else {
    column.tile = std::min(column.extent, kTileSide);
    row.tile = std::min(row.extent, kTileSize / column.tile);
    column.tile = std::min(column.extent, kTileSize / row.tile);
  }
  tiles_ = 1;
  for (TileAxis& axis : axes_) tiles_ *= axis.tiles = ceil_div(axis.extent, axis.tile);
}

}  // namespace fusestep
