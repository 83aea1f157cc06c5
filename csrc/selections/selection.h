// A part of a parameter, found: which elements of each tile are selected.
//
// Tiles are of the elements in C order (core/flat_array.h).
#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "core/flat_array.h"
#include "core/tile_bits.h"
#include "selections/choice.h"

namespace fusestep::selections {

class Selection {
 public:
  // All of `size` elements.
  void select_all(std::int64_t size);

  // Blocks of so many elements, by number, in ascending order.
  void select_blocks(std::int64_t size, std::int64_t block, std::vector<std::int64_t> numbers);

  // A fraction of the blocks of so many elements, drawn at random.
  void select_drawn(std::int64_t size, std::int64_t block, double fraction, const Draw& draw);

  // One of so many blocks of equal size, in turn.
  void select_in_turn(std::int64_t size, std::int64_t blocks, std::int64_t step);

  // Rows whose byte in a mask of the first axis is not 0.
  void select_rows(std::int64_t size, std::int64_t rows, const FlatArray& mask);

  // Elements whose byte in a mask of the parameter's shape is not 0.
  void select_mask(std::int64_t size, const FlatArray& mask);

  // Elements whose bit is set, in tiles.
  void select_bits(std::int64_t size, std::vector<TileBits> tiles);

  // A number that divides each range of selected elements, so that all of a block of so many is
  // selected or nothing; 0 for everything.
  std::int64_t granule() const { return granule_; }
  bool is_everything() const { return std::holds_alternative<All>(kind_); }

  // Tiles that may hold a selected element, in ascending order.
  std::int64_t tiles() const;
  std::int64_t tile(std::int64_t i) const;

  TileBits bits(std::int64_t tile) const;

  // The same for the i-th of those tiles, without looking for it.
  TileBits bits_of_visited(std::int64_t i) const;

  // True where all of a stretch that begins and ends with granules is selected.
  bool holds(std::int64_t element) const;

  std::int64_t size() const { return size_; }

 private:
  struct All {};
  struct Blocks {
    std::int64_t block;
    std::vector<std::int64_t> numbers, tiles;
    std::vector<std::size_t> first;  // for each tile: the first of these that reaches into it
  };
  struct Bits {
    std::vector<TileBits> tiles;
  };

  TileBits bits(const All&, std::int64_t tile) const;
  TileBits bits(const Blocks&, std::int64_t tile) const;
  TileBits bits_from(const Blocks&, std::size_t first, std::int64_t tile) const;
  TileBits bits(const FlatArray&, std::int64_t tile) const;
  TileBits bits(const Bits&, std::int64_t tile) const;
  std::int64_t size_of(std::int64_t tile) const;

  std::int64_t size_ = 0, granule_ = 0;
  std::variant<All, Blocks, FlatArray, Bits> kind_;
};

}  // namespace fusestep::selections
