// How many updates each block of a parameter has had, where steps move a part of it only.
//
// Bias corrections undo that moments begin at zero, so they must count the updates that the moments
// have seen: those of their own block. Blocks are as large as the selections so far allow, down to
// single elements.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tile_bits.h"
#include "rules/any_rule.h"

namespace fusestep::rules {

class BlockProgress {
 public:
  // False where no block differs from the parameter. Then only the next two may be called.
  bool is_split() const { return block_ > 0; }

  // All of `size` elements have come as far, by this rule.
  void split(std::int64_t size, std::int64_t block, const Progress& progress, const AnyRule& rule);

  // As a state dict says it; `products` may be empty, for rules that have none. Of blocks of no
  // elements: nothing is split.
  void restore(std::int64_t size, std::int64_t block, std::vector<std::uint32_t> steps,
               std::vector<double> products);

  // From now on blocks of so many elements can differ from each other, too.
  void refine(std::int64_t block);

  // More elements come after those there are; they have had no updates.
  void resize(std::int64_t size);

  std::int64_t size() const { return size_; }
  std::int64_t block() const { return block_; }
  const std::vector<std::uint32_t>& steps() const { return steps_; }
  const std::vector<double>& products() const { return products_; }

  Progress of(std::int64_t element) const { return of_block(block_of(element)); }

  // How far elements from this one on, and before `limit`, have come as far as it.
  std::int64_t end_of_equal(std::int64_t element, std::int64_t limit) const;

  // Whether all elements of the tile that begins with element `first` have, of those that are set.
  bool is_equal(std::int64_t first, const TileBits& bits) const;

  // Counts an update of the blocks that begin in a tile, and whose first element is set.
  void advance(const AnyRule& rule, std::int64_t first, const TileBits& moved);

 private:
  // There are no blocks but elements, and nothing but steps to count: loops over a tile without a
  // branch.
  bool is_plain() const { return block_ == 1 && products_.empty(); }
  std::int64_t end_of_equal_plain(std::int64_t element, std::int64_t limit) const;
  void divide(std::int64_t block);  // into blocks of so many elements, a divisor of the present
  bool is_equal_plain(std::int64_t first, const TileBits& bits) const;
  void advance_plain(std::int64_t first, const TileBits& moved);

  // Dividing takes as long as all the rest where there is little to do for a block.
  std::int64_t block_of(std::int64_t element) const {
    return block_ == 1 ? element : element / block_;
  }
  Progress of_block(std::int64_t block) const {
    const auto i = static_cast<std::size_t>(block);
    return {steps_[i], products_.empty() ? 1.0 : products_[i]};
  }

  std::int64_t size_ = 0, block_ = 0;

  // Half the size of Progress. A count stays at the largest: by then a bias correction has long
  // been 1.
  std::vector<std::uint32_t> steps_;
  std::vector<double> products_;  // of momenta; empty for rules that have none
};

}  // namespace fusestep::rules
