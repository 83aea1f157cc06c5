#include "cuda/step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

#include "core/errors.h"
#include "cuda/launch.h"
#include "cuda/made.h"

namespace fusestep::cuda {
namespace {

// A grid has at most 2^31 - 1 blocks.
constexpr std::int64_t kMostBlocks = 0x7fffffff;

constexpr std::int64_t kSixteen = 16;

// A parameter's share of the step, and where its list of rows is on the device.
struct Piece {
  const Work* work;
  RowList rows = {};
  const std::int64_t* written = nullptr;

  const Iteration& iteration() const { return work->iteration; }
  bool is_empty() const { return work->elements() == 0; }
  bool has_rows() const { return work->rows != nullptr; }
  bool is_strided() const { return iteration().layout != nullptr; }
  bool is_anchored() const { return work->anchor.reference != 0; }
  bool needs_full_item() const {
    if (work->followers.any() || work->lower_half != 0) return true;
    if (has_blocks())
      return is_anchored() || is_strided() || written || work->rounding.is_random_in_parameter;
    return work->rounding.is_random() || has_narrow_state();
  }
  bool has_blocks() const {
    return work->rule_operands > kState && is_in_blocks(iteration().operand[kState].dtype);
  }

  // Of a tile of rows: all tiles are as large as the row, or as tiles may be.
  std::int64_t chunks() const { return ceil_div(std::min(iteration().size, kTileSize), kChunk); }
  std::int64_t count_of(Unit unit) const {
    if (unit == Unit::block)
      return blocks_of(iteration().size) * (has_rows() ? work->rows->count() : 1);
    if (has_rows() && unit == Unit::row) return work->rows->count();
    return work->tiles() * (has_rows() && unit == Unit::share ? chunks() : 1);
  }

 private:
  bool has_narrow_state() const {
    const std::span operands(iteration().operand);
    return std::ranges::any_of(
        operands.subspan(kState, static_cast<std::size_t>(work->rule_operands - kState)),
        [](const Operand& operand) { return item_size(operand.dtype) < 4; });
  }
};
using Pieces = std::span<const Piece>;

// ---- lists of rows -----------------------------------------------------------------------------

// Writes numbers to the device, in the order of the stream. They go along as kernel parameters, so
// that a graph remembers them.
template <class Value, int at_once>
void write_some(std::span<const Value> from, Value* to, Stream stream) {
  Write<Value, at_once> body;
  for (std::size_t i = 0; i < from.size(); i += at_once) {
    const std::size_t count = std::min<std::size_t>(at_once, from.size() - i);
    body.to = to + i;
    body.count = static_cast<std::int32_t>(count);
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(i), count, body.value);
    launch(body, ceil_div(body.count, kThreads), stream);
  }
}

template <class Value>
void write(std::span<const Value> from, Value* to, Stream stream) {
  constexpr int kFew = 128, kMany = (kMostParameterBytes - 64) / sizeof(Value);
  if (from.size() <= kFew) return write_some<Value, kFew>(from, to, stream);
  write_some<Value, kMany>(from, to, stream);
}

// The same for values of any kind that consist of words.
template <class Value>
void write_words(const std::vector<Value>& from, Value* to, Stream stream) {
  static_assert(sizeof(Value) % sizeof(std::int64_t) == 0);
  std::vector<std::int64_t> words(from.size() * sizeof(Value) / sizeof(std::int64_t));
  if (words.empty()) return;
  std::memcpy(words.data(), from.data(), words.size() * sizeof(std::int64_t));
  write<std::int64_t>(words, reinterpret_cast<std::int64_t*>(to), stream);
}

// The parameters, with their lists of rows brought to the device, one after the other.
std::vector<Piece> placed(WorkList list, Workspace& workspace, Stream stream) {
  std::vector<Piece> pieces;
  pieces.reserve(list.size());
  std::vector<std::int64_t> numbers;
  for (const Work* work : list) {
    pieces.push_back({work});
    if (!work->rows) continue;
    for (const auto part : work->rows->lists())
      numbers.insert(numbers.end(), part.begin(), part.end());
  }
  if (numbers.empty()) return pieces;
  std::int64_t* const memory = workspace.row_lists(numbers.size(), stream);
  write<std::int64_t>(numbers, memory, stream);
  std::int64_t* next = memory;
  const auto place = [&](std::span<const std::int64_t> part) {
    std::int64_t* const begin = next;
    next += part.size();
    return part.empty() ? nullptr : begin;
  };
  for (Piece& piece : pieces) {
    if (!piece.has_rows()) continue;
    const auto [row, first, source, state, number, written] = piece.work->rows->lists();
    piece.rows.row = place(row);
    piece.rows.first = place(first);
    piece.rows.source = place(source);
    piece.rows.state = place(state);
    piece.rows.number = place(number);
    piece.rows.is_in_place = piece.work->rows->is_in_place();
    piece.written = place(written);
  }
  return pieces;
}

// ---- lists of parameters -----------------------------------------------------------------------

// True where four elements can be had at once, wherever a multiple of four of them begins.
bool is_aligned(const Operand& operand) {
  const auto bytes = static_cast<std::uintptr_t>(kPerThread * item_size(operand.dtype));
  return reinterpret_cast<std::uintptr_t>(operand.data) %
             std::min<std::uintptr_t>(bytes, kSixteen) ==
         0;
}

// True where that goes for all rows, if it does for this one.
bool is_aligned_in_rows(const Operand& operand, std::int64_t stride) {
  return is_aligned({operand.data + stride, operand.dtype});
}

template <class ItemList>
int axes_in(const ItemList& list) {
  if (list.count == 0) return 0;
  const auto& last = list.item[list.count - 1];
  return last.first_axis + last.axes;
}

template <class ItemList>
int axes_for(const Piece& piece) {
  if (piece.is_strided()) return piece.iteration().layout->tiling().count;
  return kIsTable<typename ItemList::Item> && ItemList::kAxes > 0 ? 1 : 0;
}

template <class Body>
bool has_room(const Body& body, const Piece& piece) {
  const auto& list = body.list;
  using ItemList = decltype(Body::list);
  constexpr std::int64_t kMostTiles = kMostBlocks * ItemList::Item::kTilesPerBlock;
  const std::int64_t tiles = piece.count_of(Body::kUnit);
  if (tiles > kMostTiles) throw Error("an array has more elements than a CUDA grid can walk");
  return list.count < ItemList::kItems &&
         axes_in(list) + axes_for<ItemList>(piece) <= ItemList::kAxes &&
         list.tiles + tiles <= kMostTiles;
}

// Where a kernel looks for an operand: what not every parameter has keeps its place free there.
int place_of(int operand, const Work& work) {
  const int others = work.rule_operands;
  if (operand < others) return operand;
  if (operand == work.anchor.reference) return others;
  if (operand == work.anchor.importance) return others + 1;
  if (operand == work.followers.average) return others + 2;
  if (operand == work.followers.copy) return others + 3;
  if (operand == work.lower_half) return others + 4;
  return kNumbers;
}

// Calls visit(operand, place) for those that an item has room for.
template <class Item, class Visit>
void for_each_operand(const Work& work, Visit visit) {
  for (int i = 0; i < work.iteration.operands; ++i)
    if (const int place = place_of(i, work); place < Item::kOperands)
      visit(static_cast<std::size_t>(i), place);
}

TileAxis with_places(const TileAxis& axis, const Work& work) {
  TileAxis placed{axis.extent, axis.tile, axis.tiles, {}};
  for (int i = 0; i < work.iteration.operands; ++i)
    placed.stride[place_of(i, work)] = axis.stride[i];
  return placed;
}

// The axis of dense rows.
template <class Item>
void add_one_axis(Item& item, TileAxis* axes, const Work& work) {
  item.axes = 1;
  *axes = {item.size, kTileSize, work.iteration.tiles(), {}};
  for_each_operand<Item>(work, [&](std::size_t i, int place) {
    axes->stride[place] = item_size(work.iteration.operand[i].dtype);
  });
}

// What an item has besides, if it is of these kinds.
template <class Item>
void add_anchor(Item& item, const Piece& piece) {
  const Work::Anchor& anchor = piece.work->anchor;
  item.lambda = anchor.lambda;
  item.lr = anchor.lr;
  item.is_anchored = piece.is_anchored();
  item.has_importance = anchor.importance != 0;
}

template <class Item>
void add_rounding(Item& item, const Work& work) {
  item.rounding = work.rounding.stream;
  item.first_number = work.numbers.first;
}

template <class Item>
void add_others(Item& item, const Work& work) {
  item.decay = work.followers.decay;
  item.has_average = work.followers.average != 0;
  item.has_copy = work.followers.copy != 0;
  item.has_lower_half = work.lower_half != 0;
  item.rounds_parameter = work.rounding.is_random_in_parameter;
  item.rounds_state = work.rounding.is_random_in_state;
  item.is_numbered_by_stride = work.iteration.layout && work.numbers.operand != 0;
}

template <class Item>
void add_blocks(Item& item, TileAxis* axes, const Piece& piece) {
  const Work& work = *piece.work;
  const Iteration& iteration = piece.iteration();
  item.rows = piece.rows;
  item.tiles = static_cast<std::uint32_t>(ceil_div(iteration.size, kTileSize));
  for (int i = kState; i < work.rule_operands; ++i)
    item.powers[i - kState] = iteration.operand[i].powers;
  if (piece.has_rows())
    for_each_operand<Item>(
        work, [&](std::size_t i, int place) { item.stride[place] = work.rows->stride[i]; });
  if constexpr (kIsFull<Item>) {
    item.written = piece.written;
    item.gradient_row = work.gradient_row;
    item.is_counted = piece.is_strided();
    if (!piece.is_strided()) add_one_axis(item, axes, work);
  }
}

template <class Item>
void add_rows(Item& item, TileAxis* axes, const Piece& piece) {
  const Work& work = *piece.work;
  item.rows = piece.rows;
  item.tiles = static_cast<std::uint32_t>(work.iteration.tiles());
  item.chunks = static_cast<std::uint32_t>(piece.chunks());
  item.row_state = work.row_state;
  item.row_state_stride = work.row_state_stride;
  item.is_aligned = item.is_aligned && !piece.is_strided() && item.size % kPerThread == 0;
  for_each_operand<Item>(work, [&](std::size_t i, int place) {
    const Operand& operand = work.iteration.operand[i];
    item.stride[place] = work.rows->stride[i];
    item.is_aligned = item.is_aligned && is_aligned_in_rows(operand, item.stride[place]);
  });
  if (!piece.is_strided()) add_one_axis(item, axes, work);
}

// Adds a parameter to a body's list, which has room for it.
template <class Body>
void add(Body& body, const Piece& piece, std::uint32_t rule) {
  auto& list = body.list;
  using Item = typename decltype(Body::list)::Item;
  const Iteration& iteration = piece.iteration();
  Item item{};
  item.size = iteration.size;
  item.first_tile = list.tiles;
  item.rule = rule;
  item.first_axis = static_cast<std::uint8_t>(axes_in(list));  // of dense ones, too: see axes_in
  item.is_aligned = true;
  item.in_double = piece.work->compute == DType::float64;
  for_each_operand<Item>(*piece.work, [&](std::size_t i, int place) {
    const Operand& operand = iteration.operand[i];
    item.data[place] = operand.data;
    item.dtypes = static_cast<typename Item::DTypes>(
        item.dtypes | static_cast<unsigned>(stored(operand.dtype)) << kDTypeBits * place);
    item.is_aligned = item.is_aligned && is_aligned(operand);
  });
  if (piece.is_strided()) {
    const Tiling tiling = iteration.layout->tiling();
    item.axes = static_cast<std::uint8_t>(tiling.count);
    item.row_axis = static_cast<std::uint8_t>(tiling.row_axis);
    item.column_axis = static_cast<std::uint8_t>(tiling.column_axis);
    std::transform(tiling.axes, tiling.axes + tiling.count, list.axis + item.first_axis,
                   [&](const TileAxis& axis) { return with_places(axis, *piece.work); });
  }
  if constexpr (kMayBeAnchored<Item>) add_anchor(item, piece);
  if constexpr (kIsRounded<Item>) add_rounding(item, *piece.work);
  if constexpr (kIsFull<Item>) add_others(item, *piece.work);
  if constexpr (kHasBlocks<Item>)
    add_blocks(item, list.axis + item.first_axis, piece);
  else if constexpr (kIsTable<Item>)
    add_rows(item, list.axis + item.first_axis, piece);
  list.item[list.count++] = item;
  list.tiles += static_cast<typename Item::Number>(piece.count_of(Body::kUnit));
}

template <class ItemList>
void clear(ItemList& list) {
  list.count = 0;
  list.tiles = 0;
}

// Launches a body for the tiles of its list, and empties the list.
template <class Body>
void flush(Body& body, Stream stream) {
  using Item = typename decltype(body.list)::Item;
  constexpr int kPerBlock = Body::kTeam == Team::warp ? kWarps : Item::kTilesPerBlock;
  launch(body, ceil_div(body.list.tiles, kPerBlock), stream);
  clear(body.list);
}

// Calls visit(list type) with the smallest list that a number of parameters may fit in.
template <class Visit>
void with_list(bool strided, std::size_t count, Visit visit) {
  if (strided) return visit.template operator()<StridedList>();
  if (count <= ShortList::kItems) return visit.template operator()<ShortList>();
  visit.template operator()<LongList>();
}

// ---- updates -----------------------------------------------------------------------------------

// One parameter, and the place of its coefficients in the table on the device.
struct Entry {
  Piece piece;
  std::uint32_t place;
  std::uint32_t loop;
  bool is_full;  // its item

  // What decides which kernel it takes.
  auto kind() const {
    const bool blocks = piece.has_blocks(), rows = !blocks && piece.has_rows();
    const bool dense = !blocks && !rows;
    return std::tuple(loop, piece.work->compute, blocks, rows, dense && piece.is_strided(), is_full,
                      dense && !is_full && piece.is_anchored(), piece.work->keeps_value);
  }
};

struct Common {
  const AnyRuleEntry* table;
  const Decision* decision;
  StepOptions options;
  Stream stream;
};

template <class Body>
bool is_last_rule(const Body& body, int count, const Entry& entry,
                  const rules::Coefficients* last) {
  return count > 0 && entry.piece.work->rule == last &&
         body.rules[count - 1].gradient_factor == entry.piece.work->gradient_factor;
}

template <class Body>
void update(std::span<const Entry> entries, const Common& common) {
  using Rule = typename Body::Rule;
  constexpr int kMostRules = kRules<decltype(Body::list)>;
  Body body;  // 32 KB of which no more is written than is needed
  clear(body.list);
  body.table = common.table;
  body.decision = common.decision;
  body.gradient_factor = common.options.gradient_factor;
  body.gradient_bound = static_cast<decltype(body.gradient_bound)>(common.options.gradient_bound);
  body.clear_gradients = common.options.clear_gradients;
  body.keeps_value = entries.front().piece.work->keeps_value;
  int rules = 0;
  const rules::Coefficients* last = nullptr;
  for (const Entry& entry : entries) {
    const Work& work = *entry.piece.work;
    const bool new_rule = !common.table && !is_last_rule(body, rules, entry, last);
    if (!has_room(body, entry.piece) || (new_rule && rules == kMostRules)) {
      flush(body, common.stream);
      rules = 0;
    }
    if (common.table) {
      add(body, entry.piece, entry.place);
      continue;
    }
    if (new_rule || rules == 0) {
      RuleEntry<Rule>& one = body.rules[rules++];
      std::memcpy(one.bytes, work.rule->bytes, sizeof one.bytes);
      one.gradient_factor = work.gradient_factor;
      last = work.rule;
    }
    add(body, entry.piece, static_cast<std::uint32_t>(rules - 1));
  }
  flush(body, common.stream);
}

template <class Loop, class T>
void update_blocks(std::span<const Entry> entries, const Common& common) {
  if constexpr (Loop::kStates > 0) {
    if (entries.front().is_full)
      update<UpdateBlocks<Loop, T, FullBlocksList>>(entries, common);
    else
      update<UpdateBlocks<Loop, T, BlocksList>>(entries, common);
  }
}

template <class Loop, class T>
void update_kind(std::span<const Entry> entries, const Common& common) {
  const auto& [first, place, loop, is_full] = entries.front();
  const auto update_list = [&]<class ItemList>() {
    update<Update<Loop, T, ItemList>>(entries, common);
  };
  if constexpr (rules::kIsRowwise<typename Loop::template Of<T>>) {
    // A dense gradient is one of all rows.
    if (is_full)
      update<UpdateWholeRows<Loop, T, FullRowsList>>(entries, common);
    else
      update<UpdateWholeRows<Loop, T, RowsList>>(entries, common);
  } else if (first.has_blocks()) {
    update_blocks<Loop, T>(entries, common);
  } else if (is_full) {
    if (first.has_rows())
      update_list.template operator()<FullRowsList>();
    else if (first.is_strided())
      update_list.template operator()<StridedFullList>();
    else
      update_list.template operator()<FullList>();
  } else if (first.has_rows()) {
    update_list.template operator()<RowsList>();
  } else if (first.is_anchored() && first.is_strided()) {
    update_list.template operator()<StridedAnchoredList>();
  } else if (first.is_anchored()) {
    update_list.template operator()<AnchoredList>();
  } else {
    with_list(first.is_strided(), entries.size(), update_list);
  }
}

void update_kind(std::span<const Entry> entries, const Common& common) {
  const Entry& first = entries.front();
  rules::Loops::visit(first.loop, [&]<class Loop>(Loop) {
    if (first.piece.work->compute == DType::float64)
      update_kind<Loop, double>(entries, common);
    else
      update_kind<Loop, float>(entries, common);
  });
}

// Calls visit(entries) with those that take the same kernel.
template <class Visit>
void for_each_kind(std::vector<Entry>& entries, Visit visit) {
  const auto kind = [](const Entry& entry) { return entry.kind(); };
  if (!std::ranges::is_sorted(entries, {}, kind)) std::ranges::stable_sort(entries, {}, kind);
  for (auto first = entries.begin(); first != entries.end();) {
    const auto last = std::find_if(first, entries.end(),
                                   [&](const Entry& e) { return e.kind() != first->kind(); });
    visit(std::span<const Entry>(first, last));
    first = last;
  }
}

void update_all(const Step& step, Pieces pieces, const Common& common) {
  const bool is_bounded = step.options.gradient_bound < std::numeric_limits<double>::infinity();
  std::vector<Entry> entries;
  entries.reserve(pieces.size());
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].is_empty()) continue;
    const std::size_t loop =
        common.table ? step.groups[step.progress[i].group].loop : pieces[i].work->rule->loop;
    entries.push_back({pieces[i], static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(loop),
                       is_bounded || pieces[i].needs_full_item()});
  }
  for_each_kind(entries, [&](std::span<const Entry> of_kind) { update_kind(of_kind, common); });
}

// ---- rows that are behind ----------------------------------------------------------------------

// The end of all steps that rows of a table may have missed, of which those that are not on the
// device yet are brought there.
const AnyRuleEntry* end_of_steps(const rules::RowHistory& history, Workspace& workspace,
                                 Stream stream) {
  Workspace::StepTable& table = workspace.step_table(history, stream);
  const auto steps = history.each_step();
  std::vector<AnyRuleEntry> added;
  for (const auto& [lr, coefficients] : steps.subspan(table.count)) {
    AnyRuleEntry& entry = added.emplace_back();
    static_assert(sizeof coefficients.bytes <= sizeof entry.bytes);
    std::memcpy(entry.bytes, coefficients.bytes, sizeof coefficients.bytes);
    entry.lr = lr;
  }
  write_words(added, table.entries() + table.count, stream);
  table.count = steps.size();
  return table.entries() + table.count;
}

// What the rows of all tables have missed, on the device.
MissedSteps* placed(std::span<const RowsBehind> tables, Workspace& workspace, Stream stream) {
  std::vector<MissedSteps> missed;
  for (const RowsBehind& table : tables) {
    const AnyRuleEntry* end = end_of_steps(*table.work->history, workspace, stream);
    for (const auto& [idle, steps] : table.missed) missed.push_back({idle, end - steps, steps});
  }
  std::byte* memory = workspace.missed_steps(missed.size() * sizeof(MissedSteps), stream);
  auto* const first = reinterpret_cast<MissedSteps*>(memory);
  write_words(missed, first, stream);
  return first;
}

template <class Body>
void catch_up(std::span<const Entry> entries, Stream stream) {
  Body body;
  clear(body.list);
  for (const Entry& entry : entries) {
    if (!has_room(body, entry.piece)) flush(body, stream);
    add(body, entry.piece, 0);
  }
  flush(body, stream);
}

void catch_up_kind(std::span<const Entry> entries, Stream stream) {
  rules::Loops::visit(entries.front().loop, [&]<class Loop>(Loop) {
    if (entries.front().piece.work->compute == DType::float64)
      catch_up<CatchUp<Loop, double>>(entries, stream);
    else
      catch_up<CatchUp<Loop, float>>(entries, stream);
  });
}

// ---- gradients that are made -------------------------------------------------------------------

// The samples of all gradients on the device: where those of each begin. Most have the same ones.
std::vector<const WeighedSample*> placed(std::span<const MadeGradient> gradients,
                                         Workspace& workspace, Stream stream) {
  std::vector<WeighedSample> samples;
  std::vector<std::size_t> first;
  const gradients::Samples* last = nullptr;
  for (const MadeGradient& gradient : gradients) {
    const gradients::Samples& one = *gradient.samples;
    const bool are_known = last && one.row == last->row && one.coefficient == last->coefficient;
    first.push_back(are_known ? first.back() : samples.size());
    if (are_known) continue;
    for (std::size_t i = 0; i < one.row.size(); ++i)
      samples.push_back({one.row[i], one.coefficient[i]});
    last = &one;
  }
  WeighedSample* const memory = workspace.weighed_samples(samples.size(), stream);
  write_words(samples, memory, stream);
  std::vector<const WeighedSample*> places;
  for (const std::size_t place : first) places.push_back(memory + place);
  return places;
}

// Null where there is nothing to be made.
template <class Body>
typename Body::Item* add_made(Body& body, const MadeGradient& gradient,
                              const WeighedSample* samples, Stream stream) {
  const Piece piece{gradient.work};
  if (piece.is_empty()) return nullptr;
  if (!has_room(body, piece)) flush(body, stream);
  add(body, piece, 0);
  typename Body::Item& item = body.list.item[body.list.count - 1];
  item.samples = samples;
  item.count = std::ssize(gradient.samples->row);
  item.noise = gradient.samples->noise;
  item.has_noise = gradient.samples->noise.deviation != 0;  // as Noise::add() has it
  return &item;
}

// ---- the norm ----------------------------------------------------------------------------------

std::int64_t tiles_of(WorkList list) {
  std::int64_t tiles = 0;
  for (const Work* work : list) tiles += work->tiles();
  return tiles;
}

// Returns how many sums there are.
template <class ItemList>
std::int64_t sum_squares(Pieces pieces, Stream stream, double prescale, double* sums,
                         double* prescaled_sums) {
  using Body = SumSquares<ItemList>;
  Body body;
  clear(body.list);
  body.prescale = prescale;
  std::int64_t before = 0;
  const auto flush_sums = [&] {
    body.sums = sums + before;
    body.prescaled_sums = prescaled_sums ? prescaled_sums + before : nullptr;
    before += body.list.tiles;
    flush(body, stream);
  };
  for (const Piece& piece : pieces) {
    if (piece.is_empty()) continue;
    if (!has_room(body, piece)) flush_sums();
    add(body, piece, 0);
  }
  flush_sums();
  return before;
}

// In the order of the list; those of rows and others take launches of their own.
void sum_tiles(Pieces pieces, Stream stream, double prescale, double* sums,
               double* prescaled_sums) {
  const bool strided = std::ranges::any_of(
      pieces, [](const Piece& piece) { return !piece.has_rows() && piece.is_strided(); });
  for (auto first = pieces.begin(); first != pieces.end();) {
    const auto last = std::find_if(first, pieces.end(), [&](const Piece& piece) {
      return piece.has_rows() != first->has_rows();
    });
    const Pieces part(first, last);
    std::int64_t count = 0;
    const auto sum = [&]<class ItemList>() {
      count = sum_squares<ItemList>(part, stream, prescale, sums, prescaled_sums);
    };
    if (first->has_rows())
      sum.template operator()<RowsList>();
    else
      with_list(strided, part.size(), sum);
    sums += count;
    if (prescaled_sums) prescaled_sums += count;
    first = last;
  }
}

// All sums of sums, one after the other.
std::int64_t room_for_groups(std::int64_t count) {
  std::int64_t room = count;
  while (count > kReductionGroup) room += count = ceil_div(count, kReductionGroup);
  return room;
}

struct Group {
  const double* values;
  std::int64_t count;
};

// Sums groups of sums until they fit in one, which is returned.
Group sum_groups(double* sums, std::int64_t count, Stream stream) {
  while (count > kReductionGroup) {
    const std::int64_t groups = ceil_div(count, kReductionGroup);
    launch(SumGroups{sums, sums + count, count}, ceil_div(groups, kWarps), stream);
    sums += count;
    count = groups;
  }
  return {sums, count};
}

// Only squares of float64 can be too large for a float64.
bool may_overflow(WorkList list) {
  return std::ranges::any_of(list, [](const Work* work) {
    return work->compute == DType::float64 &&
           work->iteration.operand[kGradient].dtype == DType::float64;
  });
}

// ---- decisions on the device -------------------------------------------------------------------

void decide(const Step& step, WorkList summed, Pieces pieces, Workspace::Record* record) {
  Decide body{};
  body.grad_scale = step.options.gradient_factor;
  body.loss_scale = step.loss_scale;
  body.found_inf = step.found_inf;
  body.clips = step.max_norm.has_value();
  body.max_norm = step.max_norm.value_or(0);
  body.skips_nonfinite = step.skip_nonfinite;
  body.counts = step.counts;
  body.decision = &record->decision;
  body.counters = &record->counters;
  if (step.needs_norm()) {
    const std::int64_t tiles = tiles_of(summed);
    const auto room = static_cast<std::size_t>(room_for_groups(tiles));
    double* sums = step.workspace->sums(room, step.stream);
    double* prescaled =
        may_overflow(summed) ? step.workspace->prescaled_sums(room, step.stream) : nullptr;
    sum_tiles(pieces, step.stream, 1, sums, prescaled);
    const Group group = sum_groups(sums, tiles, step.stream);
    body.sums = group.values;
    body.count = static_cast<std::int32_t>(group.count);
    if (prescaled) body.prescaled_sums = sum_groups(prescaled, tiles, step.stream).values;
  }
  launch(body, 1, step.stream);
}

template <class Body>
void advance(const Step& step, const Decision* decision, rules::Progress* progress,
             AnyRuleEntry* table) {
  Body body;
  body.count = 0;
  body.decision = decision;
  body.seed = step.seed;
  std::uint32_t groups = 0;
  std::uint32_t last = UINT32_MAX;
  const auto flush = [&] {
    launch(body, ceil_div(body.count, kThreads), step.stream);
    body.count = 0;
    groups = 0;
    last = UINT32_MAX;
  };
  for (std::size_t i = 0; i < step.list.size(); ++i) {
    const ProgressOnDevice& one = step.progress[i];
    if (body.count == Body::kItems || (one.group != last && groups == Body::kGroups)) flush();
    if (one.group != last) body.group[groups++] = step.groups[one.group];
    last = one.group;
    body.item[body.count++] = {progress + one.slot,
                               one.step,
                               one.momentum_product,
                               table + i,
                               step.list[i]->gradient_factor,
                               one.parameter,
                               static_cast<std::uint16_t>(groups - 1),
                               step.list[i]->compute == DType::float64};
  }
  flush();
}

}  // namespace

void take(const Step& step) {
  const CurrentDevice current(step.workspace->device());
  const WorkList summed = step.summed.empty() ? step.list : step.summed;
  std::vector<const Work*> all(step.list.begin(), step.list.end());
  all.insert(all.end(), step.summed.begin(), step.summed.end());
  const std::vector<Piece> pieces = placed(all, *step.workspace, step.stream);
  const Pieces moved = Pieces(pieces).first(step.list.size());
  Common common{nullptr, nullptr, step.options, step.stream};
  if (step.is_decided_on_device()) {
    Workspace::Record* record = step.workspace->record(step.stream);
    AnyRuleEntry* table = nullptr;
    rules::Progress* progress = nullptr;
    if (!step.progress.empty()) {  // all memory before the first launch
      table = step.workspace->table(step.list.size(), step.stream);
      progress = step.workspace->progress(1, step.stream);
    }
    decide(step, summed, Pieces(pieces).last(summed.size()), record);
    if (table && step.list.size() <= ShortAdvance::kItems)
      advance<ShortAdvance>(step, &record->decision, progress, table);
    else if (table)
      advance<LongAdvance>(step, &record->decision, progress, table);
    common.decision = &record->decision;
    common.table = table;
  }
  update_all(step, moved, common);
}

void catch_up(Workspace& workspace, Stream stream, std::span<const RowsBehind> tables) {
  const CurrentDevice current(workspace.device());
  MissedSteps* missed = placed(tables, workspace, stream);
  std::vector<Work> works;
  for (const RowsBehind& table : tables) {
    Work& work = works.emplace_back(*table.work);
    work.iteration.operand[kGradient].data = reinterpret_cast<std::byte*>(missed);
    missed += table.missed.size();
  }
  std::vector<const Work*> list;
  for (const Work& work : works) list.push_back(&work);
  std::vector<Entry> entries;
  for (const Piece& piece : placed(list, workspace, stream))
    if (!piece.is_empty())
      entries.push_back({piece, 0, static_cast<std::uint32_t>(piece.work->rule->loop), true});
  for_each_kind(entries, [&](std::span<const Entry> of_kind) { catch_up_kind(of_kind, stream); });
}

void make_gradients(Workspace& workspace, Stream stream, std::span<const MadeGradient> gradients) {
  const CurrentDevice current(workspace.device());
  const std::vector<const WeighedSample*> samples = placed(gradients, workspace, stream);
  AddUp<SamplesList> of_arrays;
  AddUp<OuterList> of_factors;
  clear(of_arrays.list);
  clear(of_factors.list);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const MadeGradient& gradient = gradients[i];
    if (gradient.factors) {
      if (OuterItem* const item = add_made(of_factors, gradient, samples[i], stream))
        item->factors = *gradient.factors;
    } else if (SamplesItem* const item = add_made(of_arrays, gradient, samples[i], stream)) {
      item->stride = gradient.stride;
    }
  }
  flush(of_arrays, stream);
  flush(of_factors, stream);
}

std::byte* room_for_gradients(Workspace& workspace, Stream stream, std::size_t bytes) {
  const CurrentDevice current(workspace.device());
  return workspace.gradients(bytes, stream);
}

std::vector<double> tile_sums(Workspace& workspace, Stream stream, WorkList list, double prescale) {
  const CurrentDevice current(workspace.device());
  std::vector<double> result(static_cast<std::size_t>(tiles_of(list)));
  if (result.empty()) return result;
  double* sums = workspace.sums(result.size(), stream);
  sum_tiles(placed(list, workspace, stream), stream, prescale, sums, nullptr);
  copy_to_host(result.data(), sums, result.size() * sizeof(double), stream);
  return result;
}

void fetch(Workspace& workspace, Stream stream, void* to, const void* from, std::size_t bytes) {
  const CurrentDevice current(workspace.device());
  copy_to_host(to, from, bytes, stream);
}

std::byte* scratch(Workspace& workspace, Stream stream, std::size_t bytes) {
  const CurrentDevice current(workspace.device());
  return workspace.scratch(bytes, stream);
}

void clear_gradients(Workspace& workspace, Stream stream, WorkList list) {
  const CurrentDevice current(workspace.device());
  for (const Piece& piece : placed(list, workspace, stream)) {
    if (piece.is_empty()) continue;
    const auto clear_list = [&]<class ItemList>() {
      Clear<ItemList> body{};
      add(body, piece, 0);
      flush(body, stream);
    };
    if (piece.has_rows())
      clear_list.template operator()<RowsList>();
    else
      with_list(piece.is_strided(), 1, clear_list);
  }
}

void write_progress(Workspace& workspace, Stream stream, std::span<const rules::Progress> progress,
                    const Counters& counters) {
  const CurrentDevice current(workspace.device());
  Workspace::Record* record = workspace.record(stream);
  rules::Progress* to = workspace.progress(progress.size(), stream);
  launch(Write<Counters, 1>{&record->counters, 1, {counters}}, 1, stream);
  write(progress, to, stream);
}

Counters read_progress(Workspace& workspace, Stream stream, std::span<rules::Progress> progress) {
  const CurrentDevice current(workspace.device());
  synchronize();  // a graph may have been replayed on any stream, and the last one may be gone
  constexpr Stream kDefault = 0;
  Counters counters;
  copy_to_host(&counters, &workspace.record(stream)->counters, sizeof counters, kDefault);
  if (!progress.empty())
    copy_to_host(progress.data(), workspace.progress(progress.size(), stream),
                 progress.size_bytes(), kDefault);
  return counters;
}

void write_rate(Workspace& workspace, Stream stream, double lr) {
  const CurrentDevice current(workspace.device());
  launch(Write<double, 1>{&workspace.record(stream)->lr, 1, {lr}}, 1, stream);
}

Scalar rate(Workspace& workspace, Stream stream) {
  const CurrentDevice current(workspace.device());
  return {&workspace.record(stream)->lr, true};
}

}  // namespace fusestep::cuda
