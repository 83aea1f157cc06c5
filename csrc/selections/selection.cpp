#include "selections/selection.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "selections/blocks.h"

namespace fusestep::selections {

void Selection::select_all(std::int64_t size) {
  size_ = size;
  granule_ = 0;
  kind_ = All{};
}

void Selection::select_blocks(std::int64_t size, std::int64_t block,
                              std::vector<std::int64_t> numbers) {
  size_ = size;
  granule_ = block;
  std::vector<std::int64_t> tiles;
  std::vector<std::size_t> first;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const std::int64_t begin = numbers[i] * block, end = std::min(size, begin + block);
    for (std::int64_t tile = begin / kTileSize; tile * kTileSize < end; ++tile)
      if (tiles.empty() || tiles.back() < tile) {
        tiles.push_back(tile);
        first.push_back(i);
      }
  }
  kind_ = Blocks{block, std::move(numbers), std::move(tiles), std::move(first)};
}

void Selection::select_drawn(std::int64_t size, std::int64_t block, double fraction,
                             const Draw& draw) {
  block = std::clamp(size, std::int64_t{1}, block);
  select_blocks(size, block, draw_blocks(ceil_div(size, block), fraction, draw));
}

void Selection::select_in_turn(std::int64_t size, std::int64_t blocks, std::int64_t step) {
  const std::int64_t block = std::max(std::int64_t{1}, ceil_div(size, blocks));
  std::vector<std::int64_t> turn{step % blocks};
  if (turn.front() * block >= size) turn.clear();  // the last blocks may be empty
  select_blocks(size, block, std::move(turn));
}

void Selection::select_rows(std::int64_t size, std::int64_t rows, const FlatArray& mask) {
  std::vector<std::int64_t> numbers;
  for (std::int64_t row = 0; row < rows; ++row)
    if (*mask.at(row) != std::byte{0}) numbers.push_back(row);
  select_blocks(size, std::max(std::int64_t{1}, rows == 0 ? 0 : size / rows), std::move(numbers));
}

void Selection::select_mask(std::int64_t size, const FlatArray& mask) {
  size_ = size;
  granule_ = 1;
  kind_ = mask;
}

void Selection::select_bits(std::int64_t size, std::vector<TileBits> tiles) {
  size_ = size;
  granule_ = 1;
  kind_ = Bits{std::move(tiles)};
}

std::int64_t Selection::tiles() const {
  if (const auto* blocks = std::get_if<Blocks>(&kind_)) return std::ssize(blocks->tiles);
  return ceil_div(size_, kTileSize);
}

std::int64_t Selection::tile(std::int64_t i) const {
  if (const auto* blocks = std::get_if<Blocks>(&kind_))
    return blocks->tiles[static_cast<std::size_t>(i)];
  return i;
}

TileBits Selection::bits(std::int64_t tile) const {
  return std::visit([&](const auto& kind) { return bits(kind, tile); }, kind_);
}

TileBits Selection::bits_of_visited(std::int64_t i) const {
  const auto* blocks = std::get_if<Blocks>(&kind_);
  if (!blocks) return bits(i);
  const auto place = static_cast<std::size_t>(i);
  return bits_from(*blocks, blocks->first[place], blocks->tiles[place]);
}

bool Selection::holds(std::int64_t element) const {
  return bits(element / kTileSize)[element % kTileSize];
}

std::int64_t Selection::size_of(std::int64_t tile) const {
  return std::min(kTileSize, size_ - tile * kTileSize);
}

TileBits Selection::bits(const All&, std::int64_t tile) const {
  return TileBits::first(size_of(tile));
}

TileBits Selection::bits(const Blocks& blocks, std::int64_t tile) const {
  const auto first = std::ranges::lower_bound(blocks.numbers, tile * kTileSize / blocks.block);
  return bits_from(blocks, static_cast<std::size_t>(first - blocks.numbers.begin()), tile);
}

TileBits Selection::bits_from(const Blocks& blocks, std::size_t first, std::int64_t tile) const {
  const std::int64_t begin = tile * kTileSize, end = begin + size_of(tile);
  TileBits bits;
  for (std::size_t i = first; i < blocks.numbers.size(); ++i) {
    const std::int64_t of_block = blocks.numbers[i] * blocks.block;
    if (of_block >= end) break;
    bits.set(std::max(begin, of_block) - begin, std::min(end, of_block + blocks.block) - begin);
  }
  return bits;
}

TileBits Selection::bits(const FlatArray& mask, std::int64_t tile) const {
  TileBits::Bytes bytes{};
  mask.for_each_stretch(
      tile * kTileSize, size_of(tile), [&](const Block& block, std::int64_t offset) {
        if (block.column_stride == 1) {
          std::memcpy(&bytes[static_cast<std::size_t>(offset)], block.data,
                      static_cast<std::size_t>(block.columns));
        } else {
          for (std::int64_t i = 0; i < block.columns; ++i)
            bytes[static_cast<std::size_t>(offset + i)] =
                std::to_integer<unsigned char>(block.data[i * block.column_stride]);
        }
      });
  for (unsigned char& byte : bytes) byte = byte != 0;
  return TileBits::of(bytes);
}

TileBits Selection::bits(const Bits& found, std::int64_t tile) const {
  return found.tiles[static_cast<std::size_t>(tile)];
}

}  // namespace fusestep::selections
