// What is done with a thread's share of a tile: all operands are loaded, then moved, then stored.
#pragma once

#include <cstdint>

#include "core/split.h"
#include "cuda/elements.h"
#include "cuda/rows.h"
#include "gradients/dense.h"
#include "rules/anchor.h"
#include "rules/moving_average.h"

namespace fusestep::cuda {

// The pull of an anchor, if there is one; its operands begin at this one.
template <class T, class Item, class Elements, int first>
class Pull {
 public:
  FUSESTEP_HOST_DEVICE Pull(const Item&, const Elements&) {}
  FUSESTEP_HOST_DEVICE void set_rate(double) {}
  FUSESTEP_HOST_DEVICE T operator()(int, T w) const { return w; }
};

template <class T, class Item, class Elements, int first>
  requires kMayBeAnchored<Item>
class Pull<T, Item, Elements, first> {
 public:
  FUSESTEP_HOST_DEVICE Pull(const Item& item, const Elements& elements) : item_(item) {
    if (item.is_anchored) reference_ = elements.load(kReference);
    if (item.has_importance) importance_ = elements.load(kImportance);
  }

  FUSESTEP_HOST_DEVICE void set_rate(double lr) {
    anchor_ = rules::Anchor<T>::of(lr * item_.lambda);
  }

  FUSESTEP_HOST_DEVICE T operator()(int k, T w) const {
    if (!item_.is_anchored) return w;
    const T importance = item_.has_importance ? get(importance_, k, kImportance) : T{1};
    return anchor_(w, get(reference_, k, kReference), importance);
  }

 private:
  using Values = typename Elements::Values;
  static constexpr int kReference = first, kImportance = first + 1;

  FUSESTEP_HOST_DEVICE T get(const Values& values, int k, int operand) const {
    const DType dtype = wide(item_.operand(operand).dtype);
    return values.get(k, dtype).template as<T>(dtype);
  }

  const Item& item_;
  rules::Anchor<T> anchor_;
  Values reference_, importance_;
};

// How what has moved is rounded: to nearest, or at random.
template <class T, class Item, class Elements>
class Rounding {
 public:
  FUSESTEP_HOST_DEVICE Rounding(const Item&, const Elements&, RandomStream) {}

  FUSESTEP_HOST_DEVICE Bits operator()(int, int, DType dtype, T value) const {
    return Bits::of(dtype, value);
  }
};

template <class T, class Item, class Elements>
  requires kIsFull<Item>
class Rounding<T, Item, Elements> {
 public:
  FUSESTEP_HOST_DEVICE Rounding(const Item& item, const Elements& elements, RandomStream stream)
      : item_(item), elements_(elements), stream_(stream), tile_(tile_of(0)) {}

  FUSESTEP_HOST_DEVICE Bits operator()(int operand, int k, DType dtype, T value) const {
    const bool is_random = operand == kParameter ? item_.rounds_parameter : item_.rounds_state;
    if (!is_random || item_size(dtype) != 2) return Bits::of(dtype, value);
    return Bits::at_random(dtype, value, random(operand, k));
  }

 private:
  FUSESTEP_HOST_DEVICE std::int64_t tile_of(int k) const { return elements_.number(k) / kTileSize; }

  // Nearly always elements are of one tile: then its key is worked out once.
  FUSESTEP_HOST_DEVICE std::uint32_t random(int operand, int k) const {
    const auto place = static_cast<std::uint32_t>(elements_.number(k) % kTileSize);
    const std::int64_t tile = tile_of(k);
    if (tile == tile_) return TileRandom::of(stream_, operand, tile_).bits(place);
    return TileRandom::of(stream_, operand, tile).bits(place);
  }

  const Item& item_;
  const Elements& elements_;
  RandomStream stream_;
  std::int64_t tile_;
};

template <class T>
FUSESTEP_HOST_DEVICE T joined(Bits upper, Bits lower) {
  const Halves halves{{static_cast<std::uint16_t>(upper.low)},
                      static_cast<std::uint16_t>(lower.low)};
  return static_cast<T>(halves.value());
}

// The lower half of a parameter that is kept in two (core/split.h), if it is: this operand. The
// parameter is the upper one then, and is read and written with it.
template <class T, class Item, class Elements, int operand>
class LowerHalf {
 public:
  FUSESTEP_HOST_DEVICE LowerHalf(const Item&, const Elements&) {}
  FUSESTEP_HOST_DEVICE T read(int, Bits parameter, DType dtype) const {
    return parameter.template as<T>(dtype);
  }
  FUSESTEP_HOST_DEVICE Bits split(int, T, Bits whole) { return whole; }
  FUSESTEP_HOST_DEVICE Bits kept(T, Bits parameter, DType) const { return parameter; }
  FUSESTEP_HOST_DEVICE void store() const {}
};

template <class T, class Item, class Elements, int operand>
  requires kIsFull<Item>
class LowerHalf<T, Item, Elements, operand> {
 public:
  FUSESTEP_HOST_DEVICE LowerHalf(const Item& item, const Elements& elements)
      : item_(item), elements_(elements) {
    if (item_.has_lower_half) before_ = elements.load(operand);
  }

  FUSESTEP_HOST_DEVICE T read(int k, Bits parameter, DType dtype) const {
    return item_.has_lower_half ? joined<T>(parameter, before_.get(k, kDType))
                                : parameter.template as<T>(dtype);
  }

  // What is stored of the parameter, of which these are the bits if it is whole.
  FUSESTEP_HOST_DEVICE Bits split(int k, T w, Bits whole) {
    if (!item_.has_lower_half) return whole;
    const Halves halves = Halves::of(static_cast<float>(w));
    after_.set(k, kDType, {halves.lower, 0});
    return {halves.upper.bits, 0};
  }

  // What it is from then on: halves lose nothing of a float32.
  FUSESTEP_HOST_DEVICE T kept(T w, Bits parameter, DType dtype) const {
    return item_.has_lower_half ? static_cast<T>(static_cast<float>(w))
                                : parameter.template as<T>(dtype);
  }

  FUSESTEP_HOST_DEVICE void store() const {
    if (item_.has_lower_half) elements_.store(operand, after_);
  }

 private:
  static constexpr DType kDType = stored(DType::bits16);

  const Item& item_;
  const Elements& elements_;
  typename Elements::Values before_, after_{};
};

// What follows a parameter, if anything does: its average and its copy, which are the operands from
// this one on.
template <class T, class Item, class Elements, int first>
class Followers {
 public:
  FUSESTEP_HOST_DEVICE Followers(const Item&, const Elements&) {}
  FUSESTEP_HOST_DEVICE void follow(int, Bits) {}
  FUSESTEP_HOST_DEVICE void store() const {}
};

template <class T, class Item, class Elements, int first>
  requires kIsFull<Item>
class Followers<T, Item, Elements, first> {
 public:
  FUSESTEP_HOST_DEVICE Followers(const Item& item, const Elements& elements)
      : item_(item), elements_(elements), moving_(item.decay) {
    if (item.has_average) average_ = elements.load(kAverage);
  }

  // The parameter as it is kept.
  FUSESTEP_HOST_DEVICE void follow(int k, T w) {
    if (item_.has_average) {
      const DType dtype = wide(item_.operand(kAverage).dtype);
      const T before = average_.get(k, dtype).template as<T>(dtype);
      average_.set(k, dtype, Bits::of(dtype, moving_.of(before, w)));
    }
    if (item_.has_copy) {
      const DType dtype = item_.operand(kCopy).dtype;
      copy_.set(k, dtype, Bits::of(dtype, w));
    }
  }

  FUSESTEP_HOST_DEVICE void store() const {
    if (item_.has_average) elements_.store(kAverage, average_);
    if (item_.has_copy) elements_.store(kCopy, copy_);
  }

 private:
  static constexpr int kAverage = first, kCopy = first + 1;

  const Item& item_;
  const Elements& elements_;
  rules::MovingAverage<T> moving_;
  typename Elements::Values average_, copy_;
};

// By what elements are moved.
template <class Rule, class T>
struct Orders {
  const Rule& rule;
  T factor;               // of gradients
  double lr;              // of an anchor
  bool keeps_value;       // only the state moves
  T bound;                // of gradients, and
  RandomStream rounding;  // both of full items
};

// The k-th of these gradients as the rule gets it.
template <class Item, class Rule, class T>
FUSESTEP_HOST_DEVICE T scaled(const T* values, int k, const Orders<Rule, T>& orders) {
  const gradients::Dense<T> dense{values, orders.factor};
  if constexpr (kIsFull<Item>)
    return gradients::Bounded<T>{dense, orders.bound}(k);
  else
    return dense(k);
}

// Moves a thread's share. The orders are asked for once all operands are under way.
template <class T, int states, class Item, class Elements, class Sources, class GetOrders>
FUSESTEP_HOST_DEVICE void move(const Item& item, const Elements& elements, const Sources& sources,
                               GetOrders get_orders) {
  using Values = typename Elements::Values;
  Values parameter = elements.load(kParameter);
  const Values gradient = elements.load(kGradient);
  Values state[states > 0 ? states : 1];
  FUSESTEP_UNROLL
  for (int s = 0; s < states; ++s) state[s] = elements.load(kState + s);
  Pull<T, Item, Elements, kState + states> pull(item, elements);
  Followers<T, Item, Elements, kState + states + 2> followers(item, elements);
  LowerHalf<T, Item, Elements, kState + states + 4> lower(item, elements);

  const auto dtype = [&](int operand) {
    const DType any = item.operand(operand).dtype;
    return operand < kState ? any : of_state(any);
  };
  const auto value = [&](const Values& values, int k, int operand) {
    return values.get(k, dtype(operand)).template as<T>(dtype(operand));
  };
  T sum[kPerThread];
  FUSESTEP_UNROLL
  for (int k = 0; k < kPerThread; ++k) sum[k] = value(gradient, k, kGradient);
  FUSESTEP_DO_NOT_UNROLL
  for (std::int64_t i = 1; i < sources.count(); ++i) {
    const Values next = elements.load(kGradient, sources.offset(i));
    FUSESTEP_UNROLL
    for (int k = 0; k < kPerThread; ++k) sum[k] += value(next, k, kGradient);
  }

  const auto orders = get_orders();
  pull.set_rate(orders.lr);
  const Rounding<T, Item, Elements> rounded(item, elements, orders.rounding);
  FUSESTEP_UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    T w = lower.read(k, parameter.get(k, dtype(kParameter)), dtype(kParameter));
    const T g = scaled<Item>(sum, k, orders);
    T s[states > 0 ? states : 1];
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i) s[i] = value(state[i], k, kState + i);
    if constexpr (states == 0) orders.rule(w, g);
    if constexpr (states == 1) orders.rule(w, g, s[0]);
    if constexpr (states == 2) orders.rule(w, g, s[0], s[1]);
    if constexpr (states == 3) orders.rule(w, g, s[0], s[1], s[2]);
    const T pulled = pull(k, w);
    const Bits moved = lower.split(k, pulled, rounded(kParameter, k, dtype(kParameter), pulled));
    parameter.set(k, dtype(kParameter), moved);
    followers.follow(k, lower.kept(pulled, moved, dtype(kParameter)));
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i)
      state[i].set(k, dtype(kState + i), rounded(kState + i, k, dtype(kState + i), s[i]));
  }

  if (!orders.keeps_value) {
    elements.store(kParameter, parameter);
    lower.store();
    followers.store();
  }
  FUSESTEP_UNROLL
  for (int s = 0; s < states; ++s) elements.store(kState + s, state[s]);
}

// Writes zeros to the gradients of a thread's share.
template <class Item, class Elements, class Sources>
FUSESTEP_HOST_DEVICE void clear(const Item& item, const Elements& elements,
                                const Sources& sources) {
  const DType dtype = item.operand(kGradient).dtype;
  typename Elements::Values zeros;
  FUSESTEP_UNROLL
  for (int k = 0; k < kPerThread; ++k) zeros.set(k, dtype, {0, 0});
  FUSESTEP_DO_NOT_UNROLL
  for (std::int64_t i = 0; i < sources.count(); ++i)
    elements.store(kGradient, zeros, sources.offset(i));
}

// One element of an operand.
template <class Item, class Place>
FUSESTEP_HOST_DEVICE Bits bits_at(const Item& item, const Place& place, int operand, int i) {
  const std::int64_t size = item_size(item.operand(operand).dtype);
  return Bits::load(place.at(operand, i, size), size);
}

// One element of the parameter, by a rule with so much state.
template <class T, int states, class Item, class Place>
FUSESTEP_HOST_DEVICE T parameter_at(const Item& item, const Place& place, int i) {
  const Bits bits = bits_at(item, place, kParameter, i);
  if constexpr (kIsFull<Item>)
    if (item.has_lower_half) return joined<T>(bits, bits_at(item, place, kState + states + 4, i));
  return bits.as<T>(item.operand(kParameter).dtype);
}

// One element of a gradient.
template <class T, class Item, class Place, class Sources>
FUSESTEP_HOST_DEVICE T gradient_at(const Item& item, const Place& place, const Sources& sources,
                                   int i) {
  const DType dtype = item.operand(kGradient).dtype;
  const std::int64_t size = item_size(dtype);
  const std::byte* from = place.at(kGradient, i, size);
  T sum = Bits::load(from, size).as<T>(dtype);
  FUSESTEP_DO_NOT_UNROLL
  for (std::int64_t k = 1; k < sources.count(); ++k)
    sum += Bits::load(from + sources.offset(k), size).template as<T>(dtype);
  return sum;
}

}  // namespace fusestep::cuda
