// What is done with a thread's share of a tile: all operands are loaded, then moved, then stored.
#pragma once

#include <cstdint>

#include "cuda/elements.h"
#include "cuda/rows.h"
#include "gradients/dense.h"
#include "rules/anchor.h"

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
    const DType dtype = item_.operand(operand).dtype;
    return values.get(k, dtype).template as<T>(dtype);
  }

  const Item& item_;
  rules::Anchor<T> anchor_;
  Values reference_, importance_;
};

// By what elements are moved.
template <class Rule, class T>
struct Orders {
  const Rule& rule;
  T factor;          // of gradients
  double lr;         // of an anchor
  bool keeps_value;  // only the state moves
};

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

  const auto dtype = [&](int operand) { return item.operand(operand).dtype; };
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
  FUSESTEP_UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    T w = value(parameter, k, kParameter);
    const T g = gradients::Dense<T>{sum, orders.factor}(k);
    T s[states > 0 ? states : 1];
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i) s[i] = value(state[i], k, kState + i);
    if constexpr (states == 0) orders.rule(w, g);
    if constexpr (states == 1) orders.rule(w, g, s[0]);
    if constexpr (states == 2) orders.rule(w, g, s[0], s[1]);
    if constexpr (states == 3) orders.rule(w, g, s[0], s[1], s[2]);
    parameter.set(k, dtype(kParameter), Bits::of(dtype(kParameter), pull(k, w)));
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i)
      state[i].set(k, dtype(kState + i), Bits::of(dtype(kState + i), s[i]));
  }

  if (!orders.keeps_value) elements.store(kParameter, parameter);
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
