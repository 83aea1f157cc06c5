// Makes up for the steps that rows have missed: a warp for each row.
//
// In closed form where that suits all elements of a row, or else step after step by the rule
// itself: the same decisions as on the CPU (cpu/updater.h). Elements are read one at a time, since
// it is memory all over a table that is waited for.
#pragma once

#include <cstdint>

#include "cuda/bodies.h"
#include "rules/anchor.h"
#include "rules/registry.h"

namespace fusestep::cuda {

// What a row has missed: put together, and where on the device it is step by step.
struct [[gnu::may_alias]] alignas(16) MissedSteps {
  rules::IdleBytes idle;
  const AnyRuleEntry* first;
  std::int64_t count;
};

// Reads what has been written to the device as words.
template <class Value>
FUSESTEP_HOST_DEVICE Value read_words(const Value* from) {
  constexpr int kWords = sizeof(Value) / sizeof(SixteenBytes);
  static_assert(sizeof(Value) % sizeof(SixteenBytes) == 0 && alignof(Value) == 16);
  SixteenBytes words[kWords];
  FUSESTEP_UNROLL
  for (int i = 0; i < kWords; ++i)
    words[i] = load<SixteenBytes>(reinterpret_cast<const std::byte*>(from) +
                                  i * static_cast<int>(sizeof(SixteenBytes)));
  Value value;
  memcpy(&value, words, sizeof value);
  return value;
}

// Calls f(first..., state...) with so many elements of an array.
template <int states, class F, class T, class... First>
FUSESTEP_HOST_DEVICE auto with_state(const F& f, [[maybe_unused]] T* state, First&... first) {
  if constexpr (states == 0)
    return f(first...);
  else if constexpr (states == 1)
    return f(first..., state[0]);
  else if constexpr (states == 2)
    return f(first..., state[0], state[1]);
  else
    return f(first..., state[0], state[1], state[2]);
}

// One element of a row, with its state, its anchor and its copy.
template <class T, int states, class Place>
class Element {
 public:
  FUSESTEP_HOST_DEVICE Element(const Row<FullRowsItem>& row, const Place& place, int i)
      : w(parameter_at<T, states>(row.item, place, i)), item_(row.item), place_(place), i_(i) {
    FUSESTEP_UNROLL
    for (int s = 0; s < states; ++s)
      state[s] = load(kState + s, of_state(item_.operand(kState + s).dtype));
    is_anchored_ = item_.is_anchored;
    if (is_anchored_) reference_ = load_wide(kReference);
    importance_ = item_.has_importance ? load_wide(kReference + 1) : T{1};
  }

  // One step of a rule without a gradient, and the pull of the anchor.
  template <class Rule>
  FUSESTEP_HOST_DEVICE void move(const Rule& rule, double lr) {
    const T zero{0}, g = gradients::Dense<T>{&zero, T{0}}(0);
    with_state<states>(rule, state, w, g);
    if (is_anchored_) w = rules::Anchor<T>::of(lr * item_.lambda)(w, reference_, importance_);
  }

  // Rounded to nearest: when a row makes up for missed steps must not matter.
  FUSESTEP_HOST_DEVICE void store() const {
    const T kept = store_parameter();
    FUSESTEP_UNROLL
    for (int s = 0; s < states; ++s) store(kState + s, state[s]);
    if (item_.has_copy) store(kCopy, kept);
  }

  T w;
  T state[states > 0 ? states : 1];

 private:
  static constexpr int kReference = kState + states, kCopy = kReference + 3;
  static constexpr int kLowerHalf = kCopy + 1;

  FUSESTEP_HOST_DEVICE T load(int operand, DType dtype) const {
    const std::int64_t size = item_size(dtype);
    return Bits::load(place_.at(operand, i_, size), size).template as<T>(dtype);
  }
  FUSESTEP_HOST_DEVICE T load_wide(int operand) const {
    return load(operand, wide(item_.operand(operand).dtype));
  }
  // Returns what is kept of it.
  FUSESTEP_HOST_DEVICE T store_parameter() const {
    if (!item_.has_lower_half)
      return store(kParameter, w).template as<T>(item_.operand(kParameter).dtype);
    const Halves halves = Halves::of(static_cast<float>(w));
    store(kParameter, Bits{halves.upper.bits, 0});
    store(kLowerHalf, Bits{halves.lower, 0});
    return static_cast<T>(static_cast<float>(w));
  }
  FUSESTEP_HOST_DEVICE Bits store(int operand, T value) const {
    return store(operand, Bits::of(item_.operand(operand).dtype, value));
  }
  FUSESTEP_HOST_DEVICE Bits store(int operand, Bits bits) const {
    const std::int64_t size = item_size(item_.operand(operand).dtype);
    bits.store(place_.at(operand, i_, size), size);
    return bits;
  }

  const FullRowsItem::Row& item_;
  const Place& place_;
  int i_;
  bool is_anchored_;
  T reference_, importance_;
};

// The values of each row that is listed, the gradient elsewhere, are its MissedSteps here.
template <class Loop, class T>
struct CatchUp {
  using Item = FullRowsItem;
  using Rule = typename Loop::template Of<T>;
  static constexpr Team kTeam = Team::warp;
  static constexpr Unit kUnit = Unit::row;

  FullRowsList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const std::int64_t number = tile_of<FullRowsList>(block, thread);
    if (number >= list.tiles) return;
    const Item& table = list.item_of(number);
    const Row<Item> row(table, number - table.first_tile);
    const auto& missed = *reinterpret_cast<const MissedSteps*>(row.item.data[kGradient]);
    if constexpr (rules::kIsRowwise<Rule>)
      replay_whole_row(thread, table, row, missed);
    else
      catch_up(thread, table, row, missed);
  }

 private:
  using Idle = typename Rule::Idle;
  using Move = typename Idle::template Move<T>;

  // Calls visit(element) for a lane's elements of a row.
  template <class Visit>
  FUSESTEP_HOST_DEVICE void for_each_element(int lane, const Item& table, const Row<Item>& row,
                                             Visit visit) const {
    FUSESTEP_DO_NOT_UNROLL
    for (std::uint32_t tile = 0; tile < table.tiles; ++tile) {
      const StridedPlace place(list, row.item, tile);
      FUSESTEP_DO_NOT_UNROLL
      for (int i = lane; i < place.count(); i += kWarpSize)
        visit(Element<T, Loop::kStates, std::remove_const_t<decltype(place)>>(row, place, i));
    }
  }

  FUSESTEP_HOST_DEVICE void catch_up(int thread, const Item& table, const Row<Item>& row,
                                     const MissedSteps& missed) const {
    const Idle idle = read_words(&missed).idle.template as<Idle>();
    const Move move(idle);
    const bool in_closed_form =
        idle.is_closed && !row.item.is_anchored && suits(thread, table, row, move);
    in_each_lane(thread, [&](int lane) {
      for_each_element(lane, table, row, [&](auto element) {
        if (in_closed_form)
          with_state<Loop::kStates>(move, element.state, element.w);
        else
          replay(missed, element);
        element.store();
      });
    });
  }

  FUSESTEP_HOST_DEVICE bool suits(int thread, const Item& table, const Row<Item>& row,
                                  const Move& move) const {
    return in_all_lanes(thread, [&](int lane) {
      bool all = true;
      for_each_element(lane, table, row, [&](auto element) {
        const auto suit = [&](auto... values) { return move.suits(values...); };
        all = all & with_state<Loop::kStates>(suit, element.state, element.w);
      });
      return all;
    });
  }

  template <class OneElement>
  FUSESTEP_HOST_DEVICE static void replay(const MissedSteps& missed, OneElement& element) {
    FUSESTEP_DO_NOT_UNROLL
    for (std::int64_t k = 0; k < missed.count; ++k) {
      const AnyRuleEntry step = read_words(missed.first + k);
      element.move(rule_of(step).rule(), step.lr);
    }
  }

  FUSESTEP_HOST_DEVICE static RuleEntry<Rule> rule_of(const AnyRuleEntry& step) {
    RuleEntry<Rule> entry;
    memcpy(entry.bytes, step.bytes, sizeof entry.bytes);
    return entry;
  }

  // By a row-wise rule: all of the row takes part in each step.
  FUSESTEP_HOST_DEVICE void replay_whole_row(int thread, const Item& table, const Row<Item>& row,
                                             const MissedSteps& missed) const {
    FUSESTEP_DO_NOT_UNROLL
    for (std::int64_t k = 0; k < missed.count; ++k) {
      const AnyRuleEntry step = read_words(missed.first + k);
      const RuleEntry<Rule> of_step = rule_of(step);
      const double sum = sum_in_groups(thread, 0, table.tiles, [&](std::int64_t tile) {
        return sum_of_tile(thread, row, static_cast<std::uint32_t>(tile), of_step.rule());
      });
      const Rule rule = rule_of_row<T>(thread, table, row, of_step.rule(), sum);
      in_each_lane(thread, [&](int lane) {
        for_each_element(lane, table, row, [&](auto element) {
          element.move(rule, step.lr);
          element.store();
        });
      });
      sync_warp();  // the accumulator is read in the next step
    }
  }

  // Each lane adds up the elements that it moves itself.
  FUSESTEP_HOST_DEVICE double sum_of_tile(int thread, const Row<Item>& row, std::uint32_t tile,
                                          const Rule& rule) const {
    const StridedPlace place(list, row.item, tile);
    return sum_in_warp<place.kUnroll>(thread, place.count(), [&](int i) {
      return rule.square(parameter_at<T, Loop::kStates>(row.item, place, i), T{0});
    });
  }
};

}  // namespace fusestep::cuda
