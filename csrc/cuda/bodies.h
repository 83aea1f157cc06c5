// The bodies of the kernels: what one thread, or one warp, does.
//
// Each is plain data with a call operator, launched by launch.h on a GPU's grid or, to test it, in
// a loop on the host. No thread waits for another one, except in sums over a warp: so a loop is all
// that the simulation takes. Formulas are those of rules/, gradients/ and core/.
#pragma once

#include <cstdint>

#include "core/gradient_norm.h"
#include "cuda/arguments.h"
#include "cuda/elements.h"
#include "cuda/warp.h"
#include "gradients/dense.h"
#include "rules/anchor.h"
#include "rules/registry.h"

namespace fusestep::cuda {

// Who calls: every thread, or the threads of a warp together.
enum class Team { thread, warp };

FUSESTEP_HOST_DEVICE bool is_first_of_warp(int thread) { return thread % kWarpSize == 0; }

// Writes zeros to the gradients of a thread's share of a tile.
template <class Item, class Elements>
FUSESTEP_HOST_DEVICE void clear(const Item& item, const Elements& elements) {
  const DType dtype = item.operand(kGradient).dtype;
  typename Elements::Values zeros;
  FUSESTEP_UNROLL
  for (int k = 0; k < kPerThread; ++k) zeros.set(k, dtype, {0, 0});
  elements.store(kGradient, zeros);
}

// What happens to a thread's share of a tile after the rule has moved it: nothing, or an anchor
// pulls, of which the operands begin at this one.
template <class T, class Item, class Elements, int first>
class Pull {
 public:
  FUSESTEP_HOST_DEVICE Pull(const Item&, const Elements&, double) {}
  FUSESTEP_HOST_DEVICE T operator()(int, T w) const { return w; }
};

template <class T, class Item, class Elements, int first>
  requires kIsAnchored<Item>
class Pull<T, Item, Elements, first> {
 public:
  FUSESTEP_HOST_DEVICE Pull(const Item& item, const Elements& elements, double lr)
      : item_(item),
        anchor_(rules::Anchor<T>::of(lr * item.lambda)),
        reference_(elements.load(kReference)) {
    if (item.has_importance) importance_ = elements.load(kImportance);
  }

  FUSESTEP_HOST_DEVICE T operator()(int k, T w) const {
    const T importance = item_.has_importance ? get(importance_, k, kImportance) : T{1};
    return anchor_(w, get(reference_, k, kReference), importance);
  }

 private:
  using Values = typename Elements::Values;
  static constexpr int kReference = first, kImportance = first + 1;

  FUSESTEP_HOST_DEVICE T get(const Values& values, int k, int operand) const {
    const DType dtype = item_.operand(operand).dtype;
    return values.get(k, dtype).template as<T>(dtype);
  }

  const Item& item_;
  rules::Anchor<T> anchor_;
  Values reference_, importance_;
};

// Moves a list of parameters and their state: a block for each tile.
template <class Loop, class T, class ItemList>
struct Update {
  using Item = typename ItemList::Item;
  using Rule = typename Loop::template Of<T>;
  static constexpr Team kTeam = Team::thread;
  static constexpr int kStates = Loop::kStates;

  const AnyRuleEntry* table;  // on the device, or null: then the coefficients are here
  const Decision* decision;   // on the device, or null: then the step happens with
  double gradient_factor;
  bool clear_gradients;
  RuleEntry<Rule> rules[kRules<ItemList>];
  ItemList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const bool take = !decision || decision->take != 0;
    if (!take && !clear_gradients) return;
    const auto tile = static_cast<std::uint32_t>(block);
    const Item& item = list.item_of(tile);
    visit_elements(list, item, tile - item.first_tile, thread, [&](const auto& elements) {
      if (take) move(item, elements);
      if (clear_gradients) clear(item, elements);
    });
  }

 private:
  template <class Elements>
  FUSESTEP_HOST_DEVICE void move(const Item& item, const Elements& elements) const {
    using Values = typename Elements::Values;
    Values parameter = elements.load(kParameter);
    const Values gradient = elements.load(kGradient);
    Values state[kStates > 0 ? kStates : 1];
    FUSESTEP_UNROLL
    for (int s = 0; s < kStates; ++s) state[s] = elements.load(kState + s);
    const Pull<T, Item, Elements, kState + kStates> pull(item, elements, rate(item));

    const RuleEntry<Rule>& entry =
        table ? *reinterpret_cast<const RuleEntry<Rule>*>(table[item.rule].bytes)
              : rules[item.rule];
    const double common = decision ? decision->gradient_factor : gradient_factor;
    const T factor = static_cast<T>(entry.gradient_factor * common);
    const auto dtype = [&](int operand) { return item.operand(operand).dtype; };
    FUSESTEP_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      T w = parameter.get(k, dtype(kParameter)).template as<T>(dtype(kParameter));
      const T g = gradient.get(k, dtype(kGradient)).template as<T>(dtype(kGradient));
      T s[kStates > 0 ? kStates : 1];
      FUSESTEP_UNROLL
      for (int i = 0; i < kStates; ++i)
        s[i] = state[i].get(k, dtype(kState + i)).template as<T>(dtype(kState + i));
      apply(entry.rule(), w, gradients::Dense<T>{&g, factor}(0), s);
      parameter.set(k, dtype(kParameter), Bits::of(dtype(kParameter), pull(k, w)));
      FUSESTEP_UNROLL
      for (int i = 0; i < kStates; ++i)
        state[i].set(k, dtype(kState + i), Bits::of(dtype(kState + i), s[i]));
    }

    elements.store(kParameter, parameter);
    FUSESTEP_UNROLL
    for (int s = 0; s < kStates; ++s) elements.store(kState + s, state[s]);
  }

  FUSESTEP_HOST_DEVICE double rate([[maybe_unused]] const Item& item) const {
    if constexpr (kIsAnchored<Item>) return table ? table[item.rule].lr : item.lr;
    return 0;
  }

  FUSESTEP_HOST_DEVICE static void apply(const Rule& rule, T& w, T g, [[maybe_unused]] T* s) {
    if constexpr (kStates == 0) rule(w, g);
    if constexpr (kStates == 1) rule(w, g, s[0]);
    if constexpr (kStates == 2) rule(w, g, s[0], s[1]);
    if constexpr (kStates == 3) rule(w, g, s[0], s[1], s[2]);
  }
};

// Clears a list of gradients: a block for each tile.
template <class ItemList>
struct Clear {
  static constexpr Team kTeam = Team::thread;

  ItemList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const auto tile = static_cast<std::uint32_t>(block);
    const auto& item = list.item_of(tile);
    visit_elements(list, item, tile - item.first_tile, thread,
                   [&](const auto& elements) { clear(item, elements); });
  }
};

// The sum of the squares of each tile's gradients: a warp for each tile.
template <class ItemList>
struct SumSquares {
  static constexpr Team kTeam = Team::warp;

  double prescale;
  double* sums;            // of the list's first tile onwards
  double* prescaled_sums;  // likewise, of gradients multiplied by kPrescale; or null
  ItemList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const auto tile = static_cast<std::uint32_t>(block * kWarps + thread / kWarpSize);
    if (tile >= list.tiles) return;
    const Item& item = list.item_of(tile);
    write(sums, tile, thread, item, prescale);
    if (prescaled_sums) write(prescaled_sums, tile, thread, item, kPrescale);
  }

 private:
  FUSESTEP_HOST_DEVICE void write(double* to, std::uint32_t tile, int thread, const Item& item,
                                  double scale) const {
    const double sum = item.in_double ? sum_of<double>(tile, thread, item, scale)
                                      : sum_of<float>(tile, thread, item, scale);
    if (is_first_of_warp(thread)) to[tile] = sum;
  }

  template <class T>
  FUSESTEP_HOST_DEVICE double sum_of(std::uint32_t tile, int thread, const Item& item,
                                     double scale) const {
    tile -= item.first_tile;
    if constexpr (ItemList::kAxes > 0)
      if (item.axes > 0) return sum_of<T>(StridedPlace(list, item, tile), thread, item, scale);
    return sum_of<T>(DensePlace(list, item, tile), thread, item, scale);
  }

  template <class T, class Place>
  FUSESTEP_HOST_DEVICE static double sum_of(const Place& place, int thread, const Item& item,
                                            double scale) {
    const DType dtype = item.operand(kGradient).dtype;
    const std::int64_t size = item_size(dtype);
    return sum_in_warp<Place::kUnroll>(thread, place.count(), [&](int i) {
      const Bits bits = Bits::load(place.at(kGradient, i, size), size);
      const double scaled = scale * static_cast<double>(bits.as<T>(dtype));
      return scaled * scaled;
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
  std::uint32_t group;
  bool in_double;
};

// Counts an update of each parameter and works out its coefficients: a thread for each.
template <int items, int groups>
struct Advance {
  static constexpr Team kTeam = Team::thread;
  static constexpr int kItems = items, kGroups = groups;

  const Decision* decision;
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
  FUSESTEP_HOST_DEVICE static void advance(const AdvanceItem& one, const AdvanceGroup& group) {
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
