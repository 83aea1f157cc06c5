// The part of a parameter that a step moves: listed rows of it, selected elements, or both; and
// how far each of its blocks has come.
//
// All operands are walked in C order, tile by tile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>

#include "core/flat_array.h"
#include "core/tile_bits.h"
#include "gradients/outer.h"
#include "gradients/rows.h"
#include "gradients/samples.h"
#include "rules/block_progress.h"
#include "selections/choice.h"
#include "selections/selection.h"

namespace fusestep::selections {

struct Part {
  std::int64_t size = 0;  // elements of the parameter
  int operands = 0;
  std::array<FlatArray, kMaxOperands> operand;
  bool has_blocks = false;  // of state, which move whole (core/blocks.h)
  int lower_half = 0;  // of them, that of the parameter, where it is kept in two (core/split.h)

  Selection selected;   // whose value may change
  bool tracks = false;  // the others' state sees the gradient, too

  // Where the gradient is one of rows: which, and how many elements each has.
  const gradients::Rows* rows = nullptr;
  Selection listed;
  std::int64_t row_size = 0;

  // Where the gradient is one for each sample: what is added up.
  const gradients::Samples* samples = nullptr;
  const gradients::Outer* outer = nullptr;  // from which each is made; else they are in an array

  // Where the selection depends on what the step finds, it is made when that is known.
  const Choice* top = nullptr;

  // Where blocks differ in how far they have come; with what their coefficients are worked out.
  rules::BlockProgress* progress = nullptr;
  const rules::AnyRule* rule = nullptr;
  double lr = 0;
  std::size_t states = 0;

  // Whether all of it moves, and by the same coefficients.
  bool moves_all() const {
    return !rows && !tracks && !top && !progress && selected.granule() == 0;
  }

  // Whether gradients are made as they are used, rather than lie in an array like the parameter.
  bool makes_gradients() const { return rows || samples; }

  // How many times the work of an element whose gradient lies in memory one of these is, roughly.
  std::int64_t effort() const {
    constexpr std::int64_t kAddedMeanwhile = 16;
    return 1 + (samples ? samples->positions * std::ssize(samples->present) / kAddedMeanwhile : 0);
  }

  // Tiles that may hold something to move.
  const Selection& visited() const { return rows ? listed : tracks ? everything : selected; }
  std::int64_t tiles() const { return visited().tiles(); }
  std::int64_t tile(std::int64_t i) const { return visited().tile(i); }
  std::int64_t size_of(std::int64_t tile) const {
    return std::min(kTileSize, size - tile * kTileSize);
  }

  // Elements of the i-th of these tiles whose state changes, and those whose value does.
  TileBits moved(std::int64_t i) const {
    const TileBits bits = visited().bits_of_visited(i);
    return rows && !tracks ? bits & selected.bits(tile(i)) : bits;
  }
  TileBits written(std::int64_t tile, const TileBits& moved) const {
    return tracks ? moved & selected.bits(tile) : moved;
  }

  // Blocks that never cross from one tile to the next are counted as the tiles move; others after.
  bool counts_by_tile() const { return progress && kTileSize % progress->block() == 0; }

  Selection everything;
};

}  // namespace fusestep::selections
