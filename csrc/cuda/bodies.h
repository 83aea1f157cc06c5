// The bodies of the kernels: what one thread, or one warp, does.
//
// Each is plain data with a call operator, launched by launch.h on a GPU's grid or, to test it, in
// a loop on the host. No thread waits for another one, except in sums over a warp: so a loop is all
// that the simulation takes. Formulas are those of rules/, gradients/ and core/.
#pragma once

#include <cstdint>

#include "core/gradient_norm.h"
#include "cuda/arguments.h"
#include "cuda/rows.h"
#include "cuda/share.h"
#include "cuda/state_blocks.h"
#include "cuda/warp.h"
#include "rules/registry.h"

namespace fusestep::cuda {

// Who calls: every thread, the threads that have a block of state together, or those of a warp.
enum class Team { thread, lanes_of_block, warp };

constexpr int threads_of(Team team) {
  return team == Team::warp ? kWarpSize : team == Team::lanes_of_block ? kLanesOfBlock : 1;
}

// What the list is cut into, and numbered by: a tile; where rows are listed, a chunk of one for
// `share`, or a whole row; a block of state.
enum class Unit { tile, share, row, block };

FUSESTEP_HOST_DEVICE bool is_first_of_warp(int thread) { return thread % kWarpSize == 0; }

// The tile, chunk or row that a thread has a share of; there may not be so many.
template <class ItemList>
FUSESTEP_HOST_DEVICE typename ItemList::Number tile_of(std::int64_t block, int thread) {
  constexpr int kPerBlock = ItemList::Item::kTilesPerBlock;
  return static_cast<typename ItemList::Number>(block * kPerBlock +
                                                thread / (kThreads / kPerBlock));
}

// What moving has in common: the list, and by what its parameters are moved.
template <class Loop, class T, class ItemList>
struct Moves {
  using Item = typename ItemList::Item;
  using Rule = typename Loop::template Of<T>;

  const AnyRuleEntry* table;  // on the device, or null: then the coefficients are here
  const Decision* decision;   // on the device, or null: then the step happens with
  double gradient_factor;
  T gradient_bound;  // of full items
  bool clear_gradients;
  bool keeps_value;  // only the state moves
  RuleEntry<Rule> rules[kRules<ItemList>];
  ItemList list;

 protected:
  FUSESTEP_HOST_DEVICE bool happen() const { return !decision || decision->take != 0; }

  FUSESTEP_HOST_DEVICE Orders<Rule, T> orders_for(const Item& item) const {
    const RuleEntry<Rule>& entry =
        table ? *reinterpret_cast<const RuleEntry<Rule>*>(table[item.rule].bytes)
              : rules[item.rule];
    const double common = decision ? decision->gradient_factor : gradient_factor;
    return {entry.rule(),   static_cast<T>(entry.gradient_factor * common),
            rate(item),     keeps_value,
            gradient_bound, rounding(item)};
  }

  FUSESTEP_HOST_DEVICE RandomStream rounding([[maybe_unused]] const Item& item) const {
    if constexpr (kIsRounded<Item>)
      return table ? table[item.rule].rounding : item.rounding;
    else
      return {};
  }

 private:
  FUSESTEP_HOST_DEVICE double rate([[maybe_unused]] const Item& item) const {
    if constexpr (kMayBeAnchored<Item>) return table ? table[item.rule].lr : item.lr;
    return 0;
  }
};

// Moves a list of parameters and their state: a block for each tile, or a warp for each chunk of
// rows.
template <class Loop, class T, class ItemList>
struct Update : Moves<Loop, T, ItemList> {
  static constexpr Team kTeam = Team::thread;
  static constexpr Unit kUnit = Unit::share;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const bool take = this->happen();
    if (!take && !this->clear_gradients) return;
    const auto tile = tile_of<ItemList>(block, thread);
    if (tile >= this->list.tiles) return;
    const auto& of_list = this->list.item_of(tile);
    const auto visit = [&](const auto& item, const auto& elements, const auto& sources) {
      if (take)
        move<T, Loop::kStates>(item, elements, sources, [&] { return this->orders_for(of_list); });
      if (this->clear_gradients) clear(item, elements, sources);
    };
    visit_share(this->list, of_list, tile - of_list.first_tile, thread, visit);
  }
};

// Moves parameters whose state is in blocks: sixteen threads for each.
template <class Loop, class T, class ItemList>
struct UpdateBlocks : Moves<Loop, T, ItemList> {
  using Item = typename ItemList::Item;
  static constexpr Team kTeam = Team::lanes_of_block;
  static constexpr Unit kUnit = Unit::block;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const bool take = this->happen();
    if (!take && !this->clear_gradients) return;
    const std::int64_t number = tile_of<ItemList>(block, thread);
    if (number >= this->list.tiles) return;
    const Item& item = this->list.item_of(number);
    const std::int64_t in_item = number - item.first_tile, in_row = blocks_of(item.size);
    const std::int64_t row_number = in_item < in_row ? 0 : in_item / in_row;  // no need to divide
    const Row<Item> row(item, row_number);
    const PlaceInCOrder place(this->list, row.item,
                              (in_item - row_number * in_row) * kBlockElements);
    SharesOfBlock<typename Loop::template Of<T>, Loop::kStates, typename Item::Row> shares(
        thread, row.item, place, written(item, in_item));
    if (take) {
      shares.for_each([&](const auto& elements) {
        move<T, Loop::kStates>(row.item, elements, row.sources,
                               [&] { return this->orders_for(item); });
      });
      shares.store_state(this->rounding(item));
    }
    if (this->clear_gradients)
      shares.for_each([&](const auto& elements) { clear(row.item, elements, row.sources); });
  }

 private:
  FUSESTEP_HOST_DEVICE static std::int64_t written(const Item& item, std::int64_t block) {
    constexpr std::int64_t kAll = -1;
    if constexpr (kIsFull<Item>) return item.written ? item.written[block] : kAll;
    return kAll;
  }
};

// The rule of one row, whose accumulator takes part in the step.
template <class T, class Rule, class Table>
FUSESTEP_HOST_DEVICE Rule rule_of_row(int thread, const Table& table, const Row<Table>& row,
                                      const Rule& of_step, double sum) {
  const DType dtype = table.row_state.dtype;
  const std::int64_t size = item_size(dtype);
  std::byte* const state = table.row_state.data + row.in_table * table.row_state_stride;
  T accumulator = Bits::load(state, size).as<T>(dtype);
  sync_warp();  // all have read it before one of them writes
  const Rule rule = of_step.of_row(sum / static_cast<double>(table.size), accumulator);
  if (is_first_of_warp(thread)) Bits::of(dtype, accumulator).store(state, size);
  return rule;
}

// Moves rows by a rule that looks at all of a row first: a warp for each.
template <class Loop, class T, class ItemList>
struct UpdateWholeRows : Moves<Loop, T, ItemList> {
  using Table = typename ItemList::Item;
  using Rule = typename Loop::template Of<T>;
  static constexpr Team kTeam = Team::warp;
  static constexpr Unit kUnit = Unit::row;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const bool take = this->happen();
    if (!take && !this->clear_gradients) return;
    const std::int64_t number = tile_of<ItemList>(block, thread);
    if (number >= this->list.tiles) return;
    const Table& table = this->list.item_of(number);
    const Row<Table> row(table, number - table.first_tile);
    if (take) move_row(thread, table, row);
    if (!this->clear_gradients) return;
    for_each_share(thread, table, row,
                   [&](const auto& elements) { clear(row.item, elements, row.sources); });
  }

 private:
  FUSESTEP_HOST_DEVICE void move_row(int thread, const Table& table, const Row<Table>& row) const {
    const Orders<Rule, T> of_step = this->orders_for(table);
    const double sum = sum_in_groups(thread, 0, table.tiles, [&](std::int64_t tile) {
      return sum_of_tile(thread, row, static_cast<std::uint32_t>(tile), of_step);
    });
    const Rule rule = rule_of_row<T>(thread, table, row, of_step.rule, sum);
    const Orders<Rule, T> orders{rule,          of_step.factor,  of_step.lr, of_step.keeps_value,
                                 of_step.bound, of_step.rounding};
    for_each_share(thread, table, row, [&](const auto& elements) {
      move<T, Loop::kStates>(row.item, elements, row.sources, [&] { return orders; });
    });
  }

  FUSESTEP_HOST_DEVICE double sum_of_tile(int thread, const Row<Table>& row, std::uint32_t tile,
                                          const Orders<Rule, T>& orders) const {
    const StridedPlace place(this->list, row.item, tile);
    return sum_in_warp<place.kUnroll>(thread, place.count(), [&](int i) {
      const T w = parameter_at<T, Loop::kStates>(row.item, place, i);
      const T gradient = gradient_at<T>(row.item, place, row.sources, i);
      return orders.rule.square(w, scaled<Table>(&gradient, 0, orders));
    });
  }

  template <class Visit>
  FUSESTEP_HOST_DEVICE void for_each_share(int thread, const Table& table, const Row<Table>& row,
                                           Visit visit) const {
    in_each_lane(thread, [&](int lane) {
      FUSESTEP_DO_NOT_UNROLL
      for (std::uint32_t chunk = 0; chunk < table.tiles * table.chunks; ++chunk)
        visit_elements_of_row(this->list, table, row, chunk, lane, visit);
    });
  }
};

// Clears a list of gradients, likewise.
template <class ItemList>
struct Clear {
  static constexpr Team kTeam = Team::thread;
  static constexpr Unit kUnit = Unit::share;

  ItemList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const auto tile = tile_of<ItemList>(block, thread);
    if (tile >= list.tiles) return;
    const auto& of_list = list.item_of(tile);
    visit_share(list, of_list, tile - of_list.first_tile, thread,
                [&](const auto&... share) { clear(share...); });
  }
};

// The sum of the squares of each tile's gradients: a warp for each tile.
template <class ItemList>
struct SumSquares {
  using Item = typename ItemList::Item;
  using Number = typename Item::Number;
  static constexpr Team kTeam = Team::warp;
  static constexpr Unit kUnit = Unit::tile;

  double prescale;
  double* sums;            // of the list's first tile onwards
  double* prescaled_sums;  // likewise, of gradients multiplied by kPrescale; or null
  ItemList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const auto tile = static_cast<Number>(block * kWarps + thread / kWarpSize);
    if (tile >= list.tiles) return;
    const Item& item = list.item_of(tile);
    write(sums, tile, thread, item, prescale);
    if (prescaled_sums) write(prescaled_sums, tile, thread, item, kPrescale);
  }

 private:
  FUSESTEP_HOST_DEVICE void write(double* to, Number tile, int thread, const Item& item,
                                  double scale) const {
    const double sum = item.in_double ? sum_of<double>(tile, thread, item, scale)
                                      : sum_of<float>(tile, thread, item, scale);
    if (is_first_of_warp(thread)) to[tile] = sum;
  }

  template <class T>
  FUSESTEP_HOST_DEVICE double sum_of(Number tile, int thread, const Item& of_list,
                                     double scale) const {
    return visit_tile(list, of_list, tile - of_list.first_tile,
                      [&](const auto& item, const auto& place, const auto& sources) {
                        constexpr int unroll = std::decay_t<decltype(place)>::kUnroll;
                        return sum_in_warp<unroll>(thread, place.count(), [&](int i) {
                          const T value = gradient_at<T>(item, place, sources, i);
                          const double scaled = scale * static_cast<double>(value);
                          return scaled * scaled;
                        });
                      });
  }
};

// Sums of groups of sums: a warp for each group.
struct SumGroups {
  static constexpr Team kTeam = Team::warp;

  const double* from;
  double* to;
  std::int64_t count;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const std::int64_t group = block * kWarps + thread / kWarpSize;
    const std::int64_t begin = group * kReductionGroup, rest = count - begin;
    if (rest <= 0) return;
    const double sum =
        sum_in_warp(thread, static_cast<int>(rest < kReductionGroup ? rest : kReductionGroup),
                    [&](int i) { return from[begin + i]; });
    if (is_first_of_warp(thread)) to[group] = sum;
  }
};

// Works out whether the step happens, and what gradients are multiplied by: one warp.
struct Decide {
  static constexpr Team kTeam = Team::warp;

  const double* sums;            // the last group of sums, or null where nobody asks for the norm
  const double* prescaled_sums;  // likewise
  std::int32_t count;
  double grad_scale;
  const float* loss_scale;  // gradients are divided by it; or null
  const float* found_inf;   // if not 0, somebody else has found what is not finite; or null
  bool clips, skips_nonfinite, counts;
  double max_norm;
  Decision* decision;
  Counters* counters;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    if (block > 0 || thread >= kWarpSize) return;
    const GradientNorm norm = gradient_norm(thread);
    if (!is_first_of_warp(thread)) return;
    const double scale = loss_scale ? grad_scale / static_cast<double>(*loss_scale) : grad_scale;
    const double magnitude = scale < 0 ? -scale : scale;
    const bool overflowed = found_inf && *found_inf != 0;
    const bool skip = skips_nonfinite && !norm.finite;
    const double clip = clips ? clip_factor(max_norm, norm.value * magnitude) : 1;
    decision->gradient_factor = scale * clip;
    decision->take = overflowed || skip ? 0 : 1;
    if (counts && !overflowed) ++(skip ? counters->skipped_steps : counters->steps);
  }

 private:
  FUSESTEP_HOST_DEVICE GradientNorm gradient_norm(int thread) const {
    if (!sums) return {0, true};
    const GradientNorm norm = norm_of(sum_in_warp(thread, count, [&](int i) { return sums[i]; }));
    if (norm.finite || !prescaled_sums) return norm;
    return norm_of_prescaled(sum_in_warp(thread, count, [&](int i) { return prescaled_sums[i]; }));
  }
};

// What Advance needs to know of a group of parameters.
struct AdvanceGroup {
  std::uint32_t loop;  // in rules::Loops
  rules::OptionBytes options;
  double lr;
  Scalar lr_on_device;  // instead, if there is one
};

// And of one parameter.
struct AdvanceItem {
  rules::Progress* progress;
  Scalar step, momentum_product;  // copies that others may write to, or null
  AnyRuleEntry* entry;            // where its coefficients go
  double gradient_factor;
  std::uint32_t parameter;  // its number, of which random choices depend
  std::uint16_t group;
  bool in_double;
};

// Counts an update of each parameter and works out its coefficients: a thread for each.
template <int items, int groups>
struct Advance {
  static constexpr Team kTeam = Team::thread;
  static constexpr int kItems = items, kGroups = groups;

  const Decision* decision;
  std::uint64_t seed;  // of random choices
  std::int32_t count;
  AdvanceItem item[items];
  AdvanceGroup group[groups];

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const std::int64_t i = block * kThreads + thread;
    if (i >= count || decision->take == 0) return;
    const AdvanceGroup& of_group = group[item[i].group];
    rules::Loops::visit(of_group.loop, [&](auto loop) {
      using Loop = decltype(loop);
      if (item[i].in_double)
        advance<typename Loop::template Of<double>>(item[i], of_group);
      else
        advance<typename Loop::template Of<float>>(item[i], of_group);
    });
  }

 private:
  template <class Rule>
  FUSESTEP_HOST_DEVICE void advance(const AdvanceItem& one, const AdvanceGroup& group) const {
    auto options = group.options.template as<typename Rule::Options>();
    options.lr = group.lr_on_device.address ? group.lr_on_device.read() : group.lr;
    rules::Progress progress = followed(one);
    progress = Rule::advance(options, progress);
    *one.progress = progress;
    if (one.step.address) one.step.write(static_cast<double>(progress.step));
    if (one.momentum_product.address) one.momentum_product.write(progress.momentum_product);
    using Entry = RuleEntry<Rule>;
    static_assert(sizeof(Entry) <= sizeof one.entry->bytes);
    const Rule rule(options, progress);
    Entry entry;
    memcpy(entry.bytes, &rule, sizeof rule);
    entry.gradient_factor = one.gradient_factor;
    memcpy(one.entry->bytes, &entry, sizeof entry);
    one.entry->lr = options.lr;
    one.entry->rounding = RandomStream::of_rounding(seed, progress.step, one.parameter);
  }

  // What the copies say counts. But a float32 cannot count beyond 2^24.
  FUSESTEP_HOST_DEVICE static rules::Progress followed(const AdvanceItem& one) {
    rules::Progress progress = *one.progress;
    if (one.step.address) {
      const double step = one.step.read();
      const auto kept = static_cast<double>(progress.step);
      const bool same = step == (one.step.is_double ? kept : static_cast<float>(kept));
      if (!same && step >= 0 && step <= 0x1p53) progress.step = static_cast<std::int64_t>(step);
    }
    if (one.momentum_product.address) progress.momentum_product = one.momentum_product.read();
    return progress;
  }
};

using ShortAdvance = Advance<32, 4>;
using LongAdvance = Advance<320, 32>;

// Writes numbers to device memory, in the order of the stream, from no memory that has to be kept.
template <class Value, int values>
struct Write {
  static constexpr Team kTeam = Team::thread;
  static constexpr int kValues = values;

  Value* to;
  std::int32_t count;
  Value value[values];

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const std::int64_t i = block * kThreads + thread;
    if (i < count) to[i] = value[i];
  }
};

}  // namespace fusestep::cuda
