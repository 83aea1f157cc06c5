// Tiles of an iteration over strided arrays: which piece of each array a tile covers.
//
// Plain data, so that a GPU can be handed the same description that the CPU walks by.
#pragma once

#include <cstdint>

#include "core/annotations.h"
#include "core/operand.h"
#include "core/reduction.h"

namespace fusestep {

// Elements a tile holds at most. Five float64 operands (40 KB) fit in a first-level cache.
// A tile is also the unit of a reduction.
inline constexpr std::int64_t kTileSize = kReductionGroup;

inline constexpr int kMaxStates = 3;                  // state arrays of one parameter
inline constexpr int kRuleOperands = 2 + kMaxStates;  // parameter, gradient, state
// And an anchor: reference, importance; then what follows the parameter: average, copy; and the
// lower half of its bits, where it has one; and the numbers of elements (Work::Numbers).
inline constexpr int kMaxOperands = kRuleOperands + 6;

inline constexpr int kParameter = 0, kGradient = 1, kState = 2;  // their places among operands

FUSESTEP_HOST_DEVICE std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

struct TileAxis {
  std::int64_t extent;
  std::int64_t tile;   // extent of a tile along this axis: 1 on all but two axes
  std::int64_t tiles;  // how many make up the axis
  std::int64_t stride[kMaxOperands];
};

struct Tiling {
  const TileAxis* axes;  // outermost first
  int count;
  int row_axis, column_axis;

  // Calls visit(k, begin, extent) with the part of axis k that tile number `tile` covers. `Index`
  // can count all tiles: on a GPU, dividing 64 bits takes a hundred instructions.
  template <class Index, class Visit>
  FUSESTEP_HOST_DEVICE void for_each_axis(Index tile, Visit visit) const {
    for (int k = count; k-- > 0;) {
      const TileAxis& axis = axes[k];
      const auto tiles = static_cast<Index>(axis.tiles);
      const std::int64_t begin = static_cast<std::int64_t>(tile % tiles) * axis.tile;
      const std::int64_t rest = axis.extent - begin;
      tile /= tiles;
      visit(k, begin, axis.tile < rest ? axis.tile : rest);
    }
  }

  // The piece of `operand`, which is number `index`, that a tile covers.
  FUSESTEP_HOST_DEVICE Block block(const Operand& operand, int index, std::int64_t tile) const {
    Block block{operand.data, operand.dtype, 1, 1, 0, item_size(operand.dtype)};
    for_each_axis(tile, [&](int k, std::int64_t begin, std::int64_t extent) {
      const std::int64_t stride = axes[k].stride[index];
      block.data += begin * stride;
      if (k == column_axis) {
        block.columns = extent;
        block.column_stride = stride;
      } else if (k == row_axis) {
        block.rows = extent;
        block.row_stride = stride;
      }
    });
    return block;
  }
};

}  // namespace fusestep
