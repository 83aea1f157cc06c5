// Gradients that are made on the GPU before a step takes them: sums over samples.
#pragma once

#include <cstdint>

#include "cuda/bodies.h"

namespace fusestep::cuda {

// One element of a sum, without the noise: from where it is in the values of sample 0.
template <class T, class Place>
FUSESTEP_HOST_DEVICE T sum_over_samples(const SamplesItem& item, const Place& place, int i,
                                        std::int64_t) {
  const DType dtype = item.operand(kGradient).dtype;
  const std::byte* const from = place.at(kGradient, i, item_size(dtype));
  const auto load = [&](std::int64_t k) {
    return Bits::load(from + item.samples[k].number * item.stride, item_size(dtype));
  };
  const auto product = [&](std::int64_t k, Bits bits) {
    return static_cast<T>(item.samples[k].times) * bits.as<T>(dtype);
  };
  T sum = gradients::kNoSamples<T>;
  std::int64_t k = 0;
  for (; k + gradients::kSamplesAtOnce <= item.count; k += gradients::kSamplesAtOnce) {
    const Bits a = load(k), b = load(k + 1), c = load(k + 2), d = load(k + 3);
    sum = gradients::plus_four(sum, product(k, a), product(k + 1, b), product(k + 2, c),
                               product(k + 3, d));
  }
  for (; k < item.count; ++k) sum += product(k, load(k));
  return sum;
}

// The same of an outer product, by the element's number: gradients/outer.h.
template <class T, class Place>
FUSESTEP_HOST_DEVICE T sum_over_samples(const OuterItem& item, const Place&, int,
                                        std::int64_t element) {
  const Factors& factors = item.factors;
  const std::int64_t row = element / factors.columns, column = element % factors.columns;
  const auto load = [&](const Factor& factor, std::int64_t term, std::int64_t place) {
    const std::int64_t sample = term / factors.positions, position = term % factors.positions;
    const std::byte* const at = factor.values.data + sample * factor.sample_stride +
                                position * factor.position_stride + place * factor.element_stride;
    const DType dtype = factor.values.dtype;
    return Bits::load(at, item_size(dtype)).as<T>(dtype);
  };
  T sum = gradients::kNoSamples<T>;
  for (std::int64_t k = 0; k < item.count; ++k) {
    const WeighedSample& term = item.samples[k];
    const T times = static_cast<T>(term.times) * load(factors.error, term.number, row);
    sum += factors.x.values.data ? times * load(factors.x, term.number, column) : times;
  }
  return sum;
}

// Makes a list of gradients: a block for each tile, and in a thread one element after the other, so
// that a few registers do, and many threads have loads under way.
template <class ItemList>
struct AddUp {
  using Item = typename ItemList::Item;
  static constexpr Team kTeam = Team::thread;
  static constexpr Unit kUnit = Unit::tile;

  ItemList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const auto tile = tile_of<ItemList>(block, thread);
    if (tile >= list.tiles) return;
    const Item& of_list = list.item_of(tile);
    visit_tile(list, of_list, tile - of_list.first_tile,
               [&](const Item& item, const auto& place, OneSource) {
                 FUSESTEP_DO_NOT_UNROLL
                 for (int i = thread; i < place.count(); i += kThreads)
                   if (item.in_double)
                     make<double>(item, place, i);
                   else
                     make<float>(item, place, i);
               });
  }

 private:
  template <class T, class Place>
  FUSESTEP_HOST_DEVICE static void make(const Item& item, const Place& place, int i) {
    std::byte* const to = place.at(kParameter, i, sizeof(T));
    const auto element = (to - item.data[kParameter]) / static_cast<std::int64_t>(sizeof(T));
    T sum = sum_over_samples<T>(item, place, i, element);
    if (item.has_noise) sum += static_cast<T>(item.noise(element));
    *reinterpret_cast<T*>(to) = sum;
  }
};

}  // namespace fusestep::cuda
