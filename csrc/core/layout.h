// How one parameter, its gradient and its state are walked together.
//
// The parameter's own memory order decides: axes are sorted by its strides, and neighbouring axes
// that every array runs through without a gap are merged. What is left is either one dense run
// (nearly always) or a strided iteration, cut into 2-D tiles.
//
// Why 2-D: take a transposed gradient of a 4096 x 4096 weight. A tile of 1,024 consecutive weights
// would touch 1,024 cache lines of the gradient, all in the same few cache sets, and use 4 bytes of
// each. A 32 x 32 tile uses whole lines of both.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/operand.h"
#include "core/tiling.h"

namespace fusestep {

// Shape and strides (in bytes) of an array, as its owner describes it.
struct Geometry {
  std::span<const std::int64_t> shape;
  std::span<const std::int64_t> strides;
};

// The common iteration space of a parameter's operands where they are not all one dense run.
class StridedLayout {
 public:
  std::int64_t tiles() const { return tiles_; }
  Tiling tiling() const {
    return {axes_.data(), static_cast<int>(axes_.size()), row_axis_, column_axis_};
  }

 private:
  friend struct Iteration;
  void cut_into_tiles(int operands);

  std::vector<TileAxis> axes_;
  int row_axis_ = 0, column_axis_ = 0;
  std::int64_t tiles_ = 0;
};

// The operands of one parameter, ready to be walked.
struct Iteration {
  std::int64_t size = 0;  // elements
  int operands = 0;       // 0: the parameter, 1: its gradient, 2...: its state, then others
  std::array<Operand, kMaxOperands> operand;
  std::shared_ptr<const StridedLayout> layout;  // null where every operand is one dense run

  // How elements follow each other: as in the parameter's memory, or as its indices do.
  enum class Order { memory, c };

  // Works out the iteration; `geometry[i]` belongs to `operand[i]`, and all shapes are equal.
  void plan(std::span<const Geometry> geometry, Order order = Order::memory);

  // The same where every operand is known to be in C order.
  void plan_dense(std::int64_t elements, int operand_count) {
    size = elements;
    operands = operand_count;
    layout.reset();
  }

  std::int64_t tiles() const {
    return layout ? layout->tiles() : (size + kTileSize - 1) / kTileSize;
  }

  Block block(int index, std::int64_t tile) const {
    if (layout) return layout->tiling().block(operand[index], index, tile);
    const std::int64_t begin = tile * kTileSize;
    return dense(index, begin, size - begin < kTileSize ? size - begin : kTileSize);
  }

  // Elements [begin, begin + count) of a dense run.
  Block dense(int index, std::int64_t begin, std::int64_t count) const {
    const Operand& o = operand[index];
    const std::int64_t item = item_size(o.dtype);
    return {o.data + begin * item, o.dtype, 1, count, 0, item, o.powers_at(begin)};
  }
};

// True where every array is in C order, whatever its strides along axes of extent 1.
bool is_c_contiguous(const Geometry& geometry, std::int64_t item);

// The strides of an array in C order.
std::vector<std::int64_t> c_strides(std::span<const std::int64_t> shape, std::int64_t item);

// True where no two elements share an address. Exact for every array that indexing and transposing
// can make; arbitrary strides fall back on sorting the addresses.
bool elements_are_disjoint(const Geometry& geometry, std::int64_t item);

}  // namespace fusestep
