// Rows of a table on a GPU: a warp takes a chunk of one of them.
#pragma once

#include <cstdint>

#include "cuda/elements.h"

namespace fusestep::cuda {

// Where the gradient is one array in memory.
struct OneSource {
  FUSESTEP_HOST_DEVICE static std::int64_t count() { return 1; }
  FUSESTEP_HOST_DEVICE static std::int64_t offset(std::int64_t) { return 0; }
};

// The rows of values that are added up to the gradient of a row; offsets are from the first.
class RowSources {
 public:
  template <class Table>
  FUSESTEP_HOST_DEVICE RowSources(const Table& table, std::int64_t number, std::int64_t in_table)
      : source_(table.rows.source ? table.rows.source + table.rows.first[number] : nullptr),
        first_(source_                  ? source_[0]
               : table.rows.is_in_place ? in_table
                                        : number),
        count_(source_ ? table.rows.first[number + 1] - table.rows.first[number] : 1),
        stride_(table.stride[kGradient]) {}

  FUSESTEP_HOST_DEVICE std::int64_t first() const { return first_; }
  FUSESTEP_HOST_DEVICE std::int64_t count() const { return count_; }
  FUSESTEP_HOST_DEVICE std::int64_t offset(std::int64_t k) const {
    return k == 0 ? 0 : (source_[k] - first_) * stride_;
  }

 private:
  const std::int64_t* source_;
  std::int64_t first_, count_, stride_;
};

// A row that moves: an item by itself.
template <class Table>
struct Row {
  std::int64_t in_table;
  RowSources sources;
  typename Table::Row item;

  FUSESTEP_HOST_DEVICE Row(const Table& table, std::int64_t number)
      : in_table(table.rows.row ? table.rows.row[number] : number),
        sources(table, number, in_table),
        item(table) {
    const std::int64_t of_state = table.rows.state ? table.rows.state[number] : in_table;
    item.data[kParameter] += in_table * table.stride[kParameter];
    item.data[kGradient] += sources.first() * table.stride[kGradient];
    FUSESTEP_UNROLL
    for (int i = kState; i < Table::kOperands; ++i) item.data[i] += of_state * table.stride[i];
    if constexpr (kIsRounded<Table>)
      item.first_number +=
          table.rows.number ? table.rows.number[number] : in_table * table.tiles * kTileSize;
    if constexpr (kHasBlocks<Table>) {
      FUSESTEP_UNROLL
      for (int i = 0; i < kMaxStates; ++i)
        if (item.powers[i]) item.powers[i] += of_state * table.stride[kState + i] / kBlockElements;
    }
  }
};

// Calls visit(elements) with a lane's share of a chunk of a row, counted through its tiles.
template <class ItemList, class Table, class Visit>
FUSESTEP_HOST_DEVICE void visit_elements_of_row(const ItemList& list, const Table& table,
                                                const Row<Table>& row, std::uint32_t chunk,
                                                int lane, Visit visit) {
  const std::uint32_t tile = chunk / table.chunks;
  const int in_tile = static_cast<int>(chunk % table.chunks) * kChunk;
  if (row.item.is_aligned) {
    const std::int64_t at = std::int64_t{tile} * kTileSize + in_tile + lane * kPerThread;
    if (at < row.item.size) visit(AdjacentElements(row.item, at));
    return;
  }
  const StridedPlace place(list, row.item, tile);
  if (in_tile < place.count()) visit(spread<kWarpSize>(row.item, place, in_tile + lane));
}

// ---- the same for all kinds of items -----------------------------------------------------------

// Calls visit(item, elements, sources) with a thread's share of a tile.
template <class ItemList, class Item, class Visit>
FUSESTEP_HOST_DEVICE void visit_share(const ItemList& list, const Item& item,
                                      typename Item::Number tile, int thread, Visit visit) {
  visit_elements(list, item, tile, thread,
                 [&](const auto& elements) { visit(item, elements, OneSource{}); });
}

template <class ItemList, class Table, class Visit>
  requires kIsTable<Table>
FUSESTEP_HOST_DEVICE void visit_share(const ItemList& list, const Table& table,
                                      typename Table::Number chunk, int thread, Visit visit) {
  const std::int64_t in_row = std::int64_t{table.tiles} * table.chunks;
  const bool is_row = in_row == 1;  // often: no need to divide
  const Row row(table, is_row ? chunk : chunk / in_row);
  visit_elements_of_row(list, table, row, static_cast<std::uint32_t>(is_row ? 0 : chunk % in_row),
                        thread % kWarpSize,
                        [&](const auto& elements) { visit(row.item, elements, row.sources); });
}

// Calls visit(item, place, sources) with where a tile is.
template <class ItemList, class Item, class Visit>
FUSESTEP_HOST_DEVICE auto visit_tile(const ItemList& list, const Item& item,
                                     typename Item::Number tile, Visit visit) {
  if constexpr (ItemList::kAxes > 0)
    if (item.axes > 0) return visit(item, StridedPlace(list, item, tile), OneSource{});
  return visit(item, DensePlace(list, item, tile), OneSource{});
}

template <class ItemList, class Table, class Visit>
  requires kIsTable<Table>
FUSESTEP_HOST_DEVICE auto visit_tile(const ItemList& list, const Table& table,
                                     typename Table::Number tile, Visit visit) {
  const Row row(table, tile / table.tiles);
  const StridedPlace place(list, row.item, static_cast<std::uint32_t>(tile % table.tiles));
  return visit(row.item, place, row.sources);
}

}  // namespace fusestep::cuda
