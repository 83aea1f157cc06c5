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
    return Bits::at_random(dtype, value, random(stream_.of_operand(operand), k));
  }

 private:
  FUSESTEP_HOST_DEVICE std::int64_t tile_of(int k) const { return elements_.number(k) / kTileSize; }

  // Nearly always elements are of one tile: then its key is worked out once.
  FUSESTEP_HOST_DEVICE std::uint32_t random(const RandomStream& stream, int k) const {
    const auto place = static_cast<std::uint32_t>(elements_.number(k) % kTileSize);
    const std::int64_t tile = tile_of(k);
    if (tile == tile_) return TileRandom::of(stream, tile_).bits(place);
    return TileRandom::of(stream, tile).bits(place);
  }

  const Item& item_;
  const Elements& elements_;
  RandomStream stream_;
  std::int64_t tile_;
};

// A parameter that is one float.
template <class T, class Item, class Elements>
class WholeParameter {
 public:
  FUSESTEP_HOST_DEVICE WholeParameter(const Item& item, const Elements& elements)
      : item_(item), elements_(elements), values_(elements.load(kParameter)) {}

  FUSESTEP_HOST_DEVICE T get(int k) const { return bits(k).template as<T>(dtype()); }

  // Returns what is kept of it.
  FUSESTEP_HOST_DEVICE T set(int k, T w, const Rounding<T, Item, Elements>& rounded) {
    const Bits moved = rounded(kParameter, k, dtype(), w);
    set(k, moved);
    return moved.template as<T>(dtype());
  }

  FUSESTEP_HOST_DEVICE void store() const { elements_.store(kParameter, values_); }

 protected:
  using Values = typename Elements::Values;

  FUSESTEP_HOST_DEVICE Bits bits(int k) const { return values_.get(k, dtype()); }
  FUSESTEP_HOST_DEVICE void set(int k, Bits bits) { values_.set(k, dtype(), bits); }

  const Item& item_;
  const Elements& elements_;

 private:
  FUSESTEP_HOST_DEVICE DType dtype() const { return item_.operand(kParameter).dtype; }

  Values values_;
};

// Either that or, if it is kept in two halves, both; the lower one is this operand.
template <class T, class Item, class Elements, int lower>
class Parameter : public WholeParameter<T, Item, Elements> {
 public:
  using WholeParameter<T, Item, Elements>::WholeParameter;
};

template <class T>
FUSESTEP_HOST_DEVICE T joined(Bits upper, Bits lower) {
  const Halves halves{{static_cast<std::uint16_t>(upper.low)},
                      static_cast<std::uint16_t>(lower.low)};
  return static_cast<T>(halves.value());
}

template <class T, class Item, class Elements, int lower>
  requires kIsFull<Item>
class Parameter<T, Item, Elements, lower> : public WholeParameter<T, Item, Elements> {
  using Whole = WholeParameter<T, Item, Elements>;

 public:
  FUSESTEP_HOST_DEVICE Parameter(const Item& item, const Elements& elements)
      : Whole(item, elements) {
    if (item.has_lower_half) lower_ = elements.load(lower);
  }

  FUSESTEP_HOST_DEVICE T get(int k) const {
    if (!item_.has_lower_half) return Whole::get(k);
    return joined<T>(Whole::bits(k), lower_.get(k, kHalf));
  }

  FUSESTEP_HOST_DEVICE T set(int k, T w, const Rounding<T, Item, Elements>& rounded) {
    if (!item_.has_lower_half) return Whole::set(k, w, rounded);
    const Halves halves = Halves::of(static_cast<float>(w));
    Whole::set(k, {halves.upper.bits, 0});
    lower_.set(k, kHalf, {halves.lower, 0});
    return static_cast<T>(halves.value());
  }

  FUSESTEP_HOST_DEVICE void store() const {
    Whole::store();
    if (item_.has_lower_half) elements_.store(lower, lower_);
  }

 private:
  using Whole::item_, Whole::elements_;
  static constexpr DType kHalf = stored(DType::bits16);

  typename Whole::Values lower_;
};

// What follows a parameter, if anything does: its average and its copy, which are the operands from
// this one on.
template <class T, class Item, class Elements, int first>
class Followers {
 public:
  FUSESTEP_HOST_DEVICE Followers(const Item&, const Elements&) {}
  FUSESTEP_HOST_DEVICE void follow(int, T) {}
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
  Parameter<T, Item, Elements, kState + states + 4> parameter(item, elements);
  const Values gradient = elements.load(kGradient);
  Values state[states > 0 ? states : 1];
  FUSESTEP_UNROLL
  for (int s = 0; s < states; ++s) state[s] = elements.load(kState + s);
  Pull<T, Item, Elements, kState + states> pull(item, elements);
  Followers<T, Item, Elements, kState + states + 2> followers(item, elements);

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
    T w = parameter.get(k);
    const T g = scaled<Item>(sum, k, orders);
    T s[states > 0 ? states : 1];
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i) s[i] = value(state[i], k, kState + i);
    if constexpr (states == 0) orders.rule(w, g);
    if constexpr (states == 1) orders.rule(w, g, s[0]);
    if constexpr (states == 2) orders.rule(w, g, s[0], s[1]);
    if constexpr (states == 3) orders.rule(w, g, s[0], s[1], s[2]);
    followers.follow(k, parameter.set(k, pull(k, w), rounded));
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i)
      state[i].set(k, dtype(kState + i), rounded(kState + i, k, dtype(kState + i), s[i]));
  }

  if (!orders.keeps_value) {
    parameter.store();
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
